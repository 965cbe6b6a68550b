using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph.Parallelization;

[TestFixture]
internal sealed class BypassPlannerTests
{
    [Test]
    public void Plan_AnyMachine_DominatedPlansAreNeverCheaperAndTheChoiceIsTheCheapest([Values] bool full, [Values] bool training)
    {
        var random = new SeededRandom(5);
        for (int i = 0; i < 100; i++)
        {
            (int m, int n, int r, int p) = Plans.NarrowLora(ref random);
            MachineModel machine = AnyMachine(ref random);
            var tokens = new PlanTokens(1 + random.Next(4096), training ? 1 + random.Next(100_000) : 0);
            BypassTap tap = BypassTap.All[random.Next(BypassTap.All.Count)];
            Bypass bypass = tap.IsSerial ? AnySerial(n, r, ref random) : AnyParallel(m, n, r, ref random);

            Planning planning = BypassPlanner.Plan(
                tap, bypass, tokens, p, machine, full ? SearchRules.Full : SearchRules.Paper);

            foreach (PlanEntry dominated in planning.Plans.Where(entry => entry.DominatedBy is not null))
            {
                PlanEntry by = planning.Plans.Single(entry => entry.Name == dominated.DominatedBy);
                Assert.That(by.DominatedBy, Is.Null);
                Assert.That(by.Cost.TotalSeconds, Is.LessThanOrEqualTo(dominated.Cost.TotalSeconds * (1 + 1e-12)));
                Assert.That(by.Cost.MemoryBytes, Is.LessThanOrEqualTo(dominated.Cost.MemoryBytes));
            }

            Assert.That(
                planning.Choice!.Cost.TotalSeconds,
                Is.EqualTo(planning.Plans.Min(entry => entry.Cost.TotalSeconds)).Within(1e-9).Percent);
        }
    }

    // The same layer with one thing changed at a time.
    [TestCase("column", 16, 512, 4096, "fast", "C1", Description = "the usual LoRA: no communication wins")]
    [TestCase("column", 16, 16384, 16384, "fast", "C2", Description = "many tokens: reading X in slices pays for a collective")]
    [TestCase("column", 16, 16384, 1 << 20, "fast", "C4", Description = "rare steps: sending u once beats C2")]
    [TestCase("column", 16, 16384, 16384, "slow", "C1", Description = "slow link: no communication wins again")]
    [TestCase("column", 1024, 512, 512, "fast", "C2", Description = "wide rank: whole weights cost more than sending u")]
    [TestCase("row", 16, 512, 4096, "fast", "R1")]
    [TestCase("row", 1024, 512, 512, "fast", "R3")]
    [TestCase("row", 1024, 512, 1 << 20, "slow", "R1", Description = "slow link, rare steps: the sum of dB is amortised")]
    [TestCase("row", 64, 16, 16, "slow", "R2", Description = "a step per short batch: dB whole at once, backward silent")]
    public void Plan_RankTokensAndLink_FlipTheChoice(
        string tap, int rank, int perBatch, int perStep, string link, string expected)
    {
        Planning planning = BypassPlanner.Plan(
            tap == "column" ? BypassTap.ColumnParallel : BypassTap.RowParallel,
            Bypass.Lora(4096, 4096, rank),
            new PlanTokens(perBatch, perStep),
            ranks: 4,
            link == "fast" ? Plans.FastLink : Plans.SlowLink);

        Assert.That(planning.Choice?.Name, Is.EqualTo(expected), PlanReport.Print(planning));
    }

    [TestCase("replicated", 64, 512, 512, "fast", "F(1,1)", Description = "copies on every rank: no communication")]
    [TestCase("replicated", 2048, 16384, 16384, "fast", "F(3,3)", Description = "wide and busy: tokens are divided")]
    [TestCase("replicated", 2048, 16384, 16384, "slow", "F(1,1)", Description = "slow link: every rank does everything")]
    [TestCase("split-hidden", 64, 512, 512, "fast", "H(2,4)", Description = "only the narrow middle is sent")]
    public void Plan_SerialAdapter_InnerWidthTokensAndLink_FlipTheChoice(
        string tap, int inner, int perBatch, int perStep, string link, string expected)
    {
        Planning planning = BypassPlanner.Plan(
            Plans.Tap(tap), Bypass.SerialAdapter(4096, inner), new PlanTokens(perBatch, perStep), ranks: 4,
            link == "fast" ? Plans.FastLink : Plans.SlowLink);

        Assert.That(planning.Choice?.Name, Is.EqualTo(expected), PlanReport.Print(planning));
    }

    [Test]
    public void Plan_Scale_StaysWhereItIs()
    {
        Planning copies = Plans.Of(BypassTap.Replicated, Bypass.Scale(4096), 4);
        Planning split = Plans.Of(BypassTap.SplitHidden, Bypass.Scale(4096), 4);

        Assert.That((copies.Choice?.Name, split.Choice?.Name), Is.EqualTo(("F(6)", "H(8)")));
        Assert.That(Plans.Undominated(split), Is.EqualTo(new[] { "H(8)" }));
    }

    [Test]
    public void Plan_WideRankManyTokensFullRules_TakesThePlanThatThePaperLacks()
    {
        Bypass bypass = Bypass.Lora(4096, 4096, 1024);
        PlanTokens tokens = new(16384, 16384);

        Planning paper = BypassPlanner.Plan(BypassTap.ColumnParallel, bypass, tokens, 4, Plans.FastLink);
        Planning full = BypassPlanner.Plan(BypassTap.ColumnParallel, bypass, tokens, 4, Plans.FastLink, SearchRules.Full);

        Assert.That((paper.Choice?.Name, full.Choice?.Name), Is.EqualTo(("C4", "C6")), PlanReport.Print(full));
        Assert.That(full.Choice!.Cost.TotalSeconds, Is.LessThan(0.9 * paper.Choice!.Cost.TotalSeconds));
    }

    [Test]
    public void Plan_ServingOnly_HasNoBackwardCostAndR2LosesItsOneAdvantage()
    {
        Planning planning = BypassPlanner.Plan(
            BypassTap.RowParallel, Bypass.Lora(4096, 4096, 16), new PlanTokens(64, 0), 4, Plans.FastLink);

        Assert.That(planning.Plans.Single(entry => entry.Name == "R2").DominatedBy, Is.EqualTo("R1"));
        Assert.That(planning.Plans.Select(entry => entry.Cost.BackwardSeconds + entry.Cost.StepSeconds), Is.All.Zero);
        Assert.That(planning.Plans.Select(entry => entry.Cost.MemoryBytes - entry.Cost.WeightBytes), Is.All.Zero);
    }

    [Test]
    public void Plan_MemoryOfOneRank_CountsWeightsGradientsMomentsAndInputs()
    {
        PlanCost cost = Plans.Of(BypassTap.RowParallel, Bypass.Lora(4096, 8192, 16), 4).Plans.Single(e => e.Name == "R3").Cost;

        double weights = 16 * (4096 + 8192) / 4.0;
        Assert.That(cost.WeightBytes, Is.EqualTo(2 * weights));
        Assert.That(cost.GradientAndOptimizerBytes, Is.EqualTo(12 * weights));
        Assert.That(cost.SavedBytes, Is.EqualTo(512 * (1024 + 4) * 2));
    }

    [Test]
    public void Plan_LittleMemory_PassesOverWhatDoesNotFit()
    {
        Bypass bypass = Bypass.Lora(4096, 4096, 16);
        PlanTokens tokens = new(512, 4096);
        Planning roomy = With(Plans.FastLink.MemoryBytes);
        double least = roomy.Plans.Min(entry => entry.Cost.MemoryBytes);
        Planning tight = With(least);
        Planning none = With(least - 1);

        Planning With(double memory) =>
            BypassPlanner.Plan(BypassTap.RowParallel, bypass, tokens, 4, Plans.FastLink with { MemoryBytes = memory });

        Assert.That((roomy.Choice?.Name, tight.Choice?.Name, none.Choice?.Name), Is.EqualTo(("R1", "R3", (string?)null)));
    }

    [Test]
    public void Plan_ImpossibleRequest_IsRejected()
    {
        PlanTokens tokens = new(1, 1);
        Bypass bypass = Bypass.Lora(64, 64, 4);
        Assert.That(() => Bypass.Lora(64, 64, 0), Throws.InstanceOf<ArgumentException>());
        Assert.That(() => Plans.Of(BypassTap.RowParallel, bypass, ranks: 1), Throws.InstanceOf<ArgumentException>());
        Assert.That(() => Plans.Of(BypassTap.RowParallel, bypass, ranks: 3), Throws.InstanceOf<ArgumentException>());
        Assert.That(
            () => Plans.Of(BypassTap.Replicated, Bypass.Lora(64, 128, 4), ranks: 2),
            Throws.InstanceOf<ArgumentException>(),
            "X + f(X) of different widths");
        Assert.That(
            () => BypassPlanner.Plan(BypassTap.RowParallel, bypass, default, 4, Plans.FastLink),
            Throws.InstanceOf<ArgumentException>());
        Assert.That(
            () => BypassPlanner.Plan(BypassTap.RowParallel, bypass, tokens, 4, Plans.FastLink with { LinkBytesPerSecond = 0 }),
            Throws.InstanceOf<ArgumentException>());
    }

    private static Bypass AnyParallel(int input, int output, int inner, ref SeededRandom random) =>
        random.Next(2) == 0 ? Bypass.Lora(input, output, inner) : Bypass.Adapter(input, output, inner);

    private static Bypass AnySerial(int width, int inner, ref SeededRandom random) =>
        random.Next(2) == 0 ? Bypass.SerialAdapter(width, inner) : Bypass.Scale(width);

    private static MachineModel AnyMachine(ref SeededRandom random) => new()
    {
        FlopsPerSecond = Math.Pow(10, 9 + (6 * random.NextDouble())),
        MemoryBytesPerSecond = Math.Pow(10, 9 + (4 * random.NextDouble())),
        LinkLatencySeconds = Math.Pow(10, -7 + (4 * random.NextDouble())),
        LinkBytesPerSecond = Math.Pow(10, 8 + (4 * random.NextDouble())),
        MemoryBytes = 1e15,
        BytesPerElement = random.Next(2) == 0 ? 2 : 4,
    };
}
