using FlexLLM.Graph;
using FlexLLM.Tests.Support;
using FsCheck;
using FsCheck.Fluent;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>Rematerialization under budgets: what is kept fits, and less room never means more kept or less computed again.</summary>
[TestFixture]
internal sealed class RematerializationBudgetTests
{
    private static readonly ModelArchitecture[] Architectures = Enum.GetValues<ModelArchitecture>();

    [Test]
    public void Budget_OfNothing_LeavesWhatNoOperationMakesAgain(
        [ValueSource(typeof(PeftMethods), nameof(PeftMethods.All))] PeftConfig method, [Values] ModelArchitecture architecture)
    {
        TrainingProgram program = Compile(architecture, method, budget: 0);
        Assert.That(program.Saved.Select(s => s.Role).Distinct(), Is.SubsetOf(new[] { "input", "lse" }));
        Assert.That(program.Saved.Count(s => s.Role == "input"), Is.EqualTo(3), "of every layer");
    }

    [Test]
    public void Budget_AsItShrinks_ComputesMoreAgain()
    {
        var freed = new List<string>();
        foreach (TrainingProgram program in Shrinking(ModelArchitecture.Llama, new LoraConfig { Rank = 2, TargetModules = ["down_proj"] }))
        {
            IEnumerable<string> roles = program.Graph.Nodes.Where(n => n.Recomputes && n.Op != OpKind.Narrow).SelectMany(n => n.Outputs)
                .Select(o => PassReport.RoleOf(program.Graph.Values[o].Name).Replace(" again", string.Empty, StringComparison.Ordinal));
            freed.AddRange(roles.Where(r => !freed.Contains(r)));
        }

        // What is cheap, then the MLP's linears (a product of hidden width an element), then the way to the queries and attention.
        Assert.That(freed, Is.EqualTo(new[]
        {
            "act", "mlp_norm", "gate", "up", "attn_norm", "q", "q_rope", "heads", "lse", "o", "middle",
        }));
    }

    // Which method, which architecture, two budgets in thousandths of what is kept without one.
    [Test]
    public void Budget_Any_IsKeptWhereItCanBe_AndLessMeansLess()
    {
        Gen<(int Method, int Architecture, int Small, int Large)> inputs =
            from method in Gen.Choose(0, PeftMethods.All.Length - 1)
            from architecture in Gen.Choose(0, Architectures.Length - 1)
            from a in Gen.Choose(0, 1100)
            from b in Gen.Choose(0, 1100)
            select (method, architecture, Math.Min(a, b), Math.Max(a, b));
        Config many = Repeatable.Many(seed: 5, count: 150);
        FsCheck.Check.One(many, Prop.ForAll(inputs.ToArbitrary(), Holds));
    }

    private static bool Holds((int Method, int Architecture, int Small, int Large) input)
    {
        (ModelArchitecture architecture, PeftConfig method) = (Architectures[input.Architecture], PeftMethods.All[input.Method]);
        TrainingProgram free = Compile(architecture, method, budget: null);
        long least = Compile(architecture, method, budget: 0).SavedColumns;
        long small = input.Small * free.SavedColumns / 1000;
        long large = input.Large * free.SavedColumns / 1000;
        TrainingProgram inSmall = Compile(architecture, method, small);
        TrainingProgram inLarge = Compile(architecture, method, large);
        return inSmall.SavedColumns <= Math.Max(small, least)
            && inLarge.SavedColumns <= Math.Max(large, least)
            && inSmall.SavedColumns <= inLarge.SavedColumns
            && FlopsAgain(inSmall) >= FlopsAgain(inLarge)
            && (large < free.SavedColumns || inLarge.SavedColumns == free.SavedColumns);
    }

    private static double FlopsAgain(TrainingProgram program) => program.Graph.Nodes
        .Where(n => n.Recomputes && n.Op is OpKind.Linear or OpKind.Attention && n.IsBackward)
        .Sum(n => OpCosts.FlopsOf(program.Graph, n, 64));

    private static IEnumerable<TrainingProgram> Shrinking(ModelArchitecture architecture, PeftConfig method)
    {
        long columns = Compile(architecture, method, budget: null).SavedColumns;
        for (long budget = columns; budget >= 0; budget -= 4)
        {
            yield return Compile(architecture, method, budget);
        }
    }

    private static TrainingProgram Compile(ModelArchitecture architecture, PeftConfig method, long? budget)
    {
        ModelConfig config = TinyModel.ConfigOf(architecture, 3);
        return TrainingGraphs.Compile(config, TrainingGraphs.Of(config, method), new CompilerOptions
        {
            Compresses = false,
            Rematerialization = new RematerializationOptions { SavedColumnsMax = budget, SequenceTokens = 64 },
        });
    }
}
