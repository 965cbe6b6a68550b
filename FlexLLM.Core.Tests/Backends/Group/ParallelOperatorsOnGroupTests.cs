using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;
using FlexLLM.Tests.Graph.Parallelization;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends.Group;

/// <summary>The collectives do what the plans mean by them: slices of a group are those of the simulated ranks.</summary>
[TestFixture]
internal sealed class ParallelOperatorsOnGroupTests
{
    [Test]
    public void Collective_OfEachParallelOperator_EqualsTheSimulatedRanks([Values(2, 3, 4)] int ranks, [Values(1, 7)] int tokens)
    {
        using GroupRig rig = new(ranks);
        var random = new SeededRandom(6);
        foreach (ParallelOperator op in ParallelOperator.All.Where(o => o.Kind >= ParallelOperatorKind.AllReduce))
        {
            // Whole numbers, so that the sums of both are exact.
            double[][,] from = [.. SimulatedRanks.Distribute(Dense.Random(tokens, 12, ref random), op.From, ranks, ref random)
                .Select(local => Dense.Map(local, local, (x, _) => Math.Round(100 * x)))];
            double[][,] expected = SimulatedRanks.Apply(op, from, sourceEverywhere: false);
            Piece[] brought = [.. from.Select(PieceOf)];

            Piece[] found = op.Kind == ParallelOperatorKind.AllReduce
                ? rig.AllReduce(brought)
                : rig.Run(CallOf(op), brought, rank => (expected[rank].GetLength(0), expected[rank].GetLength(1)));

            for (int rank = 0; rank < ranks; rank++)
            {
                Assert.That(found[rank].Values, Is.EqualTo(PieceOf(expected[rank]).Values), $"{op.Label} rank {rank}");
            }
        }
    }

    private static CollectiveCall CallOf(ParallelOperator op) => op.Label switch
    {
        "all-gather(tokens)" => (c, from, to) => c.AllGatherRows(from, to),
        "all-gather(hidden)" => (c, from, to) => c.AllGatherColumns(from, to),
        "reduce-scatter(tokens)" => (c, from, to) => c.ReduceScatterRows(from, to),
        "reduce-scatter(hidden)" => (c, from, to) => c.ReduceScatterColumns(from, to),
        "all-to-all(tokens,hidden)" => (c, from, to) => c.AllToAllRowsToColumns(from, to),
        "all-to-all(hidden,tokens)" => (c, from, to) => c.AllToAllColumnsToRows(from, to),
        _ => throw new NotSupportedException(op.Label),
    };

    private static Piece PieceOf(double[,] matrix) =>
        new(matrix.GetLength(0), matrix.GetLength(1), [.. matrix.Cast<double>().Select(value => (float)value)]);
}
