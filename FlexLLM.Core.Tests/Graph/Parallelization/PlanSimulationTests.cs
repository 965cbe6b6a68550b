using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph.Parallelization;

[TestFixture]
internal sealed class PlanSimulationTests
{
    private const int Tokens = 7; // No multiple of the ranks: token slices are ragged.

    [Test]
    public void EveryPlan_OnSimulatedRanks_EqualsOneRankForwardAndBackward(
        [ValueSource(typeof(Plans), nameof(Plans.BypassNames))] string name,
        [ValueSource(typeof(Plans), nameof(Plans.TapNames))] string tap,
        [Values(2, 4)] int ranks)
    {
        Bypass bypass = Plans.Small(name);
        BypassTap at = Plans.Tap(tap);
        IReadOnlyList<BypassPlan> plans = PlanEnumerator.Enumerate(bypass, at, ranks, SearchRules.Full);
        foreach (BypassPlan plan in plans)
        {
            var simulation = new PlanSimulation(bypass, Tokens, seed: 1, at.IsSerial);
            Assert.That(simulation.Run(plan).DistanceTo(simulation.OnOneRank()), Is.LessThan(1e-9), plan.ToString());
        }

        Assert.That(plans, Is.Not.Empty);
    }

    [TestCase("lora", "column-parallel", "C2", PlantedFault.AllReduceForgotten)]
    [TestCase("lora", "row-parallel", "R2", PlantedFault.AllReduceForgotten)]
    [TestCase("lora", "column-parallel", "C1", PlantedFault.WeightGradientsNotSummed)]
    [TestCase("lora", "row-parallel", "R1", PlantedFault.WeightGradientsNotSummed)]
    [TestCase("lora", "row-parallel", "R2", PlantedFault.ReplicatedAddedOnEveryRank)]
    [TestCase("lora", "row-parallel", "R2", PlantedFault.WholeGradientsSummed)]
    [TestCase("lora", "split-hidden", "H(2,4)", PlantedFault.AllReduceForgotten)]
    [TestCase("serial adapter", "replicated", "F(3,3)", PlantedFault.WeightGradientsNotSummed)]
    [TestCase("serial adapter", "replicated", "F(3,3)", PlantedFault.BiasGradientsNotSummed)]
    [TestCase("serial adapter", "replicated", "F(1,4)", PlantedFault.BiasGradientsNotSummed)]
    [TestCase("serial adapter", "replicated", "F(1,1)", PlantedFault.WholeGradientsSummed)]
    [TestCase("serial adapter", "replicated", "F(2,1)", PlantedFault.BiasAddedOnEveryRank)]
    [TestCase("serial adapter", "replicated", "F(4,2)", PlantedFault.BiasAddedOnEveryRank)]
    [TestCase("serial adapter", "replicated", "F(4,2)", PlantedFault.AllReduceForgotten)]
    [TestCase("serial adapter", "replicated", "F(4,2)", PlantedFault.TapGradientNotMoved, Description = "partial")]
    [TestCase("serial adapter", "replicated", "F(2,1)", PlantedFault.TapGradientNotMoved, Description = "split by columns")]
    [TestCase("serial adapter", "replicated", "F(3,3)", PlantedFault.TapGradientNotMoved, Description = "split by tokens")]
    [TestCase("serial adapter", "split-hidden", "H(2,4)", PlantedFault.BiasAddedOnEveryRank)]
    [TestCase("scale", "split-hidden", "H(8)", PlantedFault.VectorOfRankZeroOnEveryRank)]
    [TestCase("scale", "split-hidden", "H(7)", PlantedFault.WeightGradientsNotSummed)]
    [TestCase("scale", "replicated", "F(6)", PlantedFault.WholeGradientsSummed)]
    [TestCase("everything", "row-parallel", "R(2,9,5,9)", PlantedFault.BiasAddedOnEveryRank)]
    [TestCase("everything", "row-parallel", "R(2,9,5,9)", PlantedFault.WeightGradientsNotSummed)]
    [TestCase("everything", "row-parallel", "R(2,9,5,9)", PlantedFault.WholeGradientsSummed, Description = "db is whole")]
    public void PlantedFault_IsNoticed(string bypass, string tap, string name, PlantedFault fault)
    {
        BypassTap at = Plans.Tap(tap);
        BypassPlan plan = Plans.Find(Plans.Small(bypass), at, ranks: 4, name);
        var simulation = new PlanSimulation(Plans.Small(bypass), Tokens, seed: 1, at.IsSerial);

        Assert.That(simulation.Run(plan, fault).DistanceTo(simulation.OnOneRank()), Is.GreaterThan(0.1));
    }

    [Test]
    public void ReplicatedAddedToPreReduce_CountsOncePerRank_AndTheRulesRejectIt([Values(2, 4)] int ranks)
    {
        var random = new SeededRandom(3);
        double[,] baseValue = Dense.Random(3, 5, ref random);
        double[,] bypass = Dense.Random(3, 5, ref random);
        double[][,] partials = SimulatedRanks.Distribute(baseValue, TensorLayout.PreReduce, ranks, ref random);

        double[,] wrong = SimulatedRanks.Sum([.. partials.Select(p => Dense.Map(p, bypass, (a, b) => a + b))]);
        partials[0] = Dense.Map(partials[0], bypass, (a, b) => a + b);
        double[,] right = SimulatedRanks.Sum(partials);

        Assert.That(Dense.Distance(wrong, Dense.Map(baseValue, bypass, (a, b) => a + (ranks * b))), Is.LessThan(1e-9));
        Assert.That(Dense.Distance(right, Dense.Map(baseValue, bypass, (a, b) => a + b)), Is.LessThan(1e-9));
        Assert.That(OperatorRules.Add(TensorLayout.PreReduce, TensorLayout.Replicated), Is.Null);
        Assert.That(
            OperatorRules.Add(TensorLayout.PreReduce, TensorLayout.Replicated, onOneRank: true),
            Is.EqualTo(TensorLayout.PreReduce));
    }

    [Test]
    public void ParallelOperator_MovesTheValueAndChangesNothing([Values(2, 3, 4)] int ranks)
    {
        var random = new SeededRandom(4);
        double[,] value = Dense.Random(Tokens, 12, ref random);
        foreach (ParallelOperator op in ParallelOperator.All)
        {
            double[][,] local = SimulatedRanks.Distribute(value, op.From, ranks, ref random);
            double[,] moved = SimulatedRanks.Assemble(SimulatedRanks.Apply(op, local, sourceEverywhere: false), op.To);
            Assert.That(Dense.Distance(moved, value), Is.LessThan(1e-9), op.Label);
        }
    }
}
