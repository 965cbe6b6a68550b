using FlexLLM.Finetuning;
using FlexLLM.Graph;
using FlexLLM.Graph.Parallelization;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>Bytes of activations pass by pass: by hand where that is possible, by their laws elsewhere.</summary>
[TestFixture]
internal sealed class ActivationPlanTests
{
    private const int Tokens = 64;

    private static readonly ModelConfig Model = new()
    {
        Architecture = ModelArchitecture.Llama,
        HiddenSize = 32,
        IntermediateSize = 80,
        LayerCount = 3,
        AttentionHeads = 4,
        KeyValueHeads = 2,
        HeadDim = 8,
        VocabularySize = 100,
        MaxPositions = 512,
    };

    private static readonly PeftConfig DownProj = new LoraConfig { Rank = 2, TargetModules = ["down_proj"] };

    private static readonly PeftConfig[] Methods =
    [
        DownProj,
        new LoraConfig { Rank = 2, TargetModules = AdapterSites.ModuleNames },
        new SerialAdapterConfig { Size = 4 },
        new SerialAdapterConfig { Size = 4, Activation = AdapterActivation.Silu },
        new Ia3Config(),
    ];

    [Test]
    public void Unoptimized_LoraOnDownProj_IsTheSumByHand([Values(2, 4)] int elementBytes)
    {
        ActivationPlan plan = ActivationPlan.Of(Job(DownProj) with { ElementBytes = elementBytes });

        // Of a layer: q, q_rope and heads; k, k_rope and v; gate, up and act; x A; and of hidden width its input, both norms, o,
        // middle, the base, the bypass and their sum. After the layers: their output and its norm.
        const int Layer = (3 * 32) + (3 * 16) + (3 * 80) + 2 + (8 * 32) + (4 * Tokens);
        const int PerToken = (3 * Layer) + (2 * 32);
        Assert.That(plan.Unoptimized.Bytes, Is.EqualTo((long)elementBytes * Tokens * ((2 * PerToken) + (2 * 100))));
    }

    [Test]
    public void Pruned_LoraOnDownProj_IsTheSumByHand()
    {
        ActivationPlan plan = ActivationPlan.Of(Job(DownProj));

        // Layer 0: act and x A. Above: norm inputs, queries, gate and up as well, and the log-sum-exp in full width.
        Assert.That(
            plan.Pruned.BytesOf(ActivationUse.Kept),
            Is.EqualTo(Tokens * ((2 * ((3 * (80 + 2)) + (2 * ((3 * 32) + (2 * 80))))) + (4 * 2 * 4))));
        Assert.That(plan.Pruned.BytesOf(ActivationUse.KeysAndValues), Is.EqualTo(Tokens * 2 * 3 * 2 * 16));
        Assert.That(plan.Pruned.BytesOf(ActivationUse.Gradients), Is.EqualTo(Tokens * ((2 * 32) + (4 * 2 * 16))));
        Assert.That(plan.Pruned.BytesOf(ActivationUse.Loss), Is.EqualTo(Tokens * 2 * 2 * 100));
    }

    [Test]
    public void TokenLevel_InF32_KeepsWhatTheProgramSaves([ValueSource(nameof(Methods))] PeftConfig method, [Values] bool bf16)
    {
        PlannedJob job = Job(method) with { ElementBytes = 4, Window = 16, StoresSavedAsBF16 = bf16 };
        TrainingProgram program = TrainingGraphs.Compile(
            Model, TrainingGraphs.Of(Model, method), new CompilerOptions { StoresSavedAsBF16 = bf16 });
        ActivationStage stage = ActivationPlan.Of(job).TokenLevel;
        Assert.That(stage.BytesOf(ActivationUse.Kept), Is.EqualTo(4 * Tokens * program.SavedColumns));
        Assert.That(
            stage.Rows.Single(r => r.Use == ActivationUse.Workspace && r.Name == "backward").Bytes,
            Is.EqualTo(4 * 16 * program.Arena.Columns));
    }

    [Test]
    public void Stages_NeverGrow(
        [ValueSource(nameof(Methods))] PeftConfig method, [Values] ModelArchitecture architecture, [Values(1, 2)] int ranks)
    {
        PlannedJob job = Job(method) with { Model = Model with { Architecture = architecture }, Ranks = ranks, Window = 16 };
        ActivationPlan plan = ActivationPlan.Of(job);
        Assert.That(plan.Stages.Select(s => s.Bytes), Is.Ordered.Descending);
        Assert.That(plan.Reports.Skip(1).Select(r => r.KeptBytes(2)), Is.Ordered.Descending);
    }

    [Test]
    public void TokenLevel_SmallerWindows_ShrinkWorkspaceAndLogitsAlone()
    {
        ActivationStage wide = ActivationPlan.Of(Job(DownProj) with { Window = 64 }).TokenLevel;
        ActivationStage narrow = ActivationPlan.Of(Job(DownProj) with { Window = 16 }).TokenLevel;
        Assert.That(4 * narrow.BytesOf(ActivationUse.Workspace), Is.EqualTo(wide.BytesOf(ActivationUse.Workspace)));
        Assert.That(3 * narrow.BytesOf(ActivationUse.Loss), Is.EqualTo(wide.BytesOf(ActivationUse.Loss)), "of 48 rows");
        Assert.That(narrow.BytesOf(ActivationUse.Kept), Is.EqualTo(wide.BytesOf(ActivationUse.Kept)));
    }

    [Test]
    public void Ranks_DivideHeadsAndMlp_NotTheResidualStream()
    {
        ActivationStage one = ActivationPlan.Of(Job(DownProj)).TokenLevel;
        ActivationStage two = ActivationPlan.Of(Job(DownProj) with { Ranks = 2 }).TokenLevel;
        foreach (string divided in new[] { "gate", "up", "act", "q_rope", "lse" })
        {
            Assert.That(2 * Kept(two, divided), Is.EqualTo(Kept(one, divided)), divided);
        }

        foreach (string whole in new[] { "input", "middle" })
        {
            Assert.That(Kept(two, whole), Is.EqualTo(Kept(one, whole)), whole);
        }
    }

    [Test]
    public void Within_AnyBudgetAboveTheLeast_IsKept_AndCostsMoreTheLessItIs()
    {
        ActivationPlan plan = ActivationPlan.Of(Job(DownProj) with { Window = 16 });
        double before = 0;
        foreach (double share in new[] { 1.0, 0.95, 0.9, 0.8, 0.7, 0.6 })
        {
            long budget = (long)(share * plan.TokenLevel.Bytes);
            ActivationStage stage = plan.Within(budget);
            Assert.That(stage.Bytes, Is.LessThanOrEqualTo(budget));
            Assert.That(stage.RecomputedFlops, Is.GreaterThanOrEqualTo(before));
            Assert.That(stage.Forced, share < 1 ? Is.Not.Empty : Is.Empty);
            before = stage.RecomputedFlops;
        }
    }

    [Test]
    public void Within_ALargeModel_TakesLittleMoreThanItMust([Values(0.35, 0.5, 0.7, 0.9)] double share)
    {
        ActivationPlan plan = ActivationPlan.Of(new PlannedJob { Model = ModelShapes.Of("llama-3.1-8b"), Method = DownProj });
        long budget = (long)(share * plan.TokenLevel.Bytes);
        long value = 2L * 1024 * 14336;
        Assert.That(plan.Within(budget).Bytes, Is.InRange(budget - (2 * value), budget), "the widest value of a layer, and its workspace");
    }

    [Test]
    public void Within_TooLittle_IsRefused_AndWhatWouldFitDoes()
    {
        PlannedJob job = Job(DownProj) with { Window = 16, Tokens = 512 };
        ActivationPlan plan = ActivationPlan.Of(job);
        long budget = plan.AdapterBytes + (plan.TokenLevel.Bytes / 4);
        RequestRejectedException refused =
            Assert.Throws<RequestRejectedException>(() => plan.Within(budget, withAdapter: true))!;
        Assert.That(refused.Message, Does.Contain("512 tokens in windows of 16").And.Contain("tokens would fit"));
        int tokens = int.Parse(refused.Message.Split("A sample of ")[1].Split(' ')[0]);
        Assert.That(tokens, Is.InRange(16, 511));
        ActivationStage fits = ActivationPlan.Of(job with { Tokens = tokens }).Within(budget, withAdapter: true);
        Assert.That(fits.Bytes + plan.AdapterBytes, Is.LessThanOrEqualTo(budget));
    }

    [Test]
    public void Within_LessThanTheAdapter_IsRefused()
    {
        ActivationPlan plan = ActivationPlan.Of(Job(DownProj));
        Assert.That(
            () => plan.Within(plan.AdapterBytes, withAdapter: true),
            Throws.TypeOf<RequestRejectedException>().With.Message.Contains("lower rank"));
    }

    // On one rank the input of the second norm is the cheapest to have again; on several that takes a collective.
    [TestCase(1, true)]
    [TestCase(2, false)]
    public void Within_SumsOverRanks_AreNotComputedAgain(int ranks, bool computesMiddle)
    {
        ModelConfig model = Model with { HeadDim = 2 };
        ActivationPlan plan = ActivationPlan.Of(Job(DownProj) with { Model = model, Ranks = ranks, Window = 16, Tokens = 16 });
        ActivationStage stage = plan.Within((long)(0.95 * plan.TokenLevel.Bytes));
        Assert.That(stage.Forced.Select(r => r.Role), computesMiddle ? Does.Contain("middle") : Does.Not.Contain("middle"));
        Assert.That(stage.Forced, Is.Not.Empty);
    }

    [Test]
    public void StepFlops_OfALargeModel_AreFourAWeight()
    {
        ModelConfig model = ModelShapes.Of("llama-3.1-8b");
        double weights = DecoderWeights.Of(model).Where(w => !w.Name.Contains("embed", StringComparison.Ordinal)).Sum(w => (double)w.Count);
        double flops = ActivationPlan.Of(new PlannedJob { Model = model, Method = DownProj, Tokens = 16 }).StepFlops;
        Assert.That(flops / weights, Is.EqualTo(4).Within(0.15), "layer 0 has no way back, adapters and attention are little");
    }

    [Test]
    public void Parameters_OnARank_AreTheUndividedAndItsShareOfTheDivided()
    {
        // down_proj: A reads the rank's 40 of 80 columns, B is whole. q_proj: A is whole, B makes the rank's 16 of 32.
        PlannedJob job = Job(new LoraConfig { Rank = 2, TargetModules = ["q_proj", "down_proj"] }) with { Ranks = 2, Moments = 1 };
        ActivationPlan plan = ActivationPlan.Of(job);
        Assert.That(plan.Parameters, Is.EqualTo(3 * 2 * (40 + 32 + 32 + 16)));
        Assert.That(plan.AdapterBytes, Is.EqualTo(plan.Parameters * 4 * 3));
    }

    [Test]
    public void PlanBypasses_GroupsModulesOfOneKind_AndChoosesForEach()
    {
        PlannedJob job = Job(new LoraConfig { Rank = 2, TargetModules = AdapterSites.ModuleNames }) with { Ranks = 2 };
        MachineModel machine = MachineModels.Of("a100", 2);
        Assert.That(
            job.PlanBypasses(machine).Select(p => $"{p.Modules}: {p.Planning.Tap.Name}, {p.Planning.Choice!.Name}"),
            Is.EqualTo(new[]
            {
                "q_proj: column-parallel, C1", "k_proj, v_proj: column-parallel, C1", "o_proj: row-parallel, R1",
                "gate_proj, up_proj: column-parallel, C1", "down_proj: row-parallel, R1",
            }));
        IEnumerable<string> taps = new PeftConfig[] { new SerialAdapterConfig { Size = 4 }, new Ia3Config() }
            .SelectMany(m => (Job(m) with { Ranks = 2 }).PlanBypasses(machine)).Select(p => $"{p.Modules}: {p.Planning.Tap.Name}");
        Assert.That(taps, Is.EqualTo(new[]
        {
            "o_proj, down_proj: replicated", "k_proj, v_proj: split-hidden", "down_proj: split-hidden",
        }));
    }

    [TestCase("ranks", 3, "possible are 1, 2")]
    [TestCase("ranks", 4, "possible are 1, 2")]
    [TestCase("ranks", 0, "possible are 1, 2")]
    [TestCase("tokens", 0, "1 to 512")]
    [TestCase("tokens", 513, "1 to 512")]
    [TestCase("window", 0, "at least 1")]
    [TestCase("bytes", 3, "2 or 4")]
    [TestCase("moments", 3, "0, 1 or 2")]
    [TestCase("bf16", 0, "elements of 4")]
    [TestCase("rank", 0, "1 to 32")]
    [TestCase("rank", 33, "1 to 32")]
    public void Of_WhatCannotBe_IsRefusedWithWhatCould(string what, int value, string advice)
    {
        PlannedJob job = what switch
        {
            "ranks" => Job(DownProj) with { Ranks = value },
            "tokens" => Job(DownProj) with { Tokens = value },
            "window" => Job(DownProj) with { Window = value },
            "bytes" => Job(DownProj) with { ElementBytes = value },
            "moments" => Job(DownProj) with { Moments = value },
            "rank" => Job(new LoraConfig { Rank = value, TargetModules = ["down_proj"] }),
            _ => Job(DownProj) with { StoresSavedAsBF16 = true },
        };
        Assert.That(() => ActivationPlan.Of(job), Throws.TypeOf<RequestRejectedException>().With.Message.Contains(advice));
    }

    [TestCase("down_proj,down_proj", "named twice")]
    [TestCase("lm_head", "known are q_proj")]
    public void Of_BadModules_IsRefused(string modules, string advice) => Assert.That(
        () => ActivationPlan.Of(Job(new LoraConfig { TargetModules = modules.Split(',') })),
        Throws.TypeOf<RequestRejectedException>().With.Message.Contains(advice));

    [Test]
    public void MachineModels_Unknown_IsRefusedWithTheList()
    {
        Assert.That(() => MachineModels.Of("tpu", 2), Throws.ArgumentException.With.Message.Contains("a100, h100, cpu"));
        foreach (string name in MachineModels.Names)
        {
            Assert.That(() => MachineModels.Of(name, 4).Validate(), Throws.Nothing);
        }
    }

    private static PlannedJob Job(PeftConfig method) => new() { Model = Model, Method = method, Tokens = Tokens };

    private static long Kept(ActivationStage stage, string name) =>
        stage.Rows.Single(r => r.Use == ActivationUse.Kept && r.Name == name).Bytes;
}
