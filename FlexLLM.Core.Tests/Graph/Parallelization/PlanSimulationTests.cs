using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph.Parallelization;

[TestFixture]
internal sealed class PlanSimulationTests
{
    private const int Tokens = 7; // No multiple of the ranks: token slices are ragged.

    private static readonly Bypass Lora = Bypass.Lora(input: 16, output: 24, rank: 8);

    [Test]
    public void EveryPlan_OnSimulatedRanks_EqualsOneRankForwardAndBackward([Values(2, 4)] int ranks, [Values] bool adapter)
    {
        Bypass bypass = adapter ? Bypass.Adapter(16, 24, 8) : Lora;
        int plans = 0;
        foreach (BypassTap tap in new[] { BypassTap.ColumnParallel, BypassTap.RowParallel })
        {
            foreach (BypassPlan plan in PlanEnumerator.Enumerate(bypass, tap, ranks, SearchRules.Full))
            {
                var simulation = new PlanSimulation(bypass, Tokens, seed: 1);
                Assert.That(simulation.Run(plan).DistanceTo(simulation.OnOneRank()), Is.LessThan(1e-9), plan.ToString());
                plans++;
            }
        }

        Assert.That(plans, Is.GreaterThan(20));
    }

    [TestCase("C2", PlantedFault.AllReduceForgotten)]
    [TestCase("R2", PlantedFault.AllReduceForgotten)]
    [TestCase("C1", PlantedFault.WeightGradientsNotSummed)]
    [TestCase("R1", PlantedFault.WeightGradientsNotSummed)]
    [TestCase("R2", PlantedFault.ReplicatedAddedOnEveryRank)]
    public void PlantedFault_IsNoticed(string name, PlantedFault fault)
    {
        BypassTap tap = name[0] == 'C' ? BypassTap.ColumnParallel : BypassTap.RowParallel;
        BypassPlan plan = Plans.Find(Lora, tap, ranks: 4, name);
        var simulation = new PlanSimulation(Lora, Tokens, seed: 1);

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
