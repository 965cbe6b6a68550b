using FlexLLM.Primitives;

namespace FlexLLM.Graph.Parallelization;

/// <summary>The operators that change a layout and leave the value alone.</summary>
internal enum ParallelOperatorKind
{
    Partition,
    Combine,
    Replicate,
    Reduce,
    AllReduce,
    AllGather,
    ReduceScatter,
    AllToAll,
}

/// <summary>
/// One legal transition between two layouts (paper.md b.2). The table is all there is: nothing leads out of a replicated
/// layout, and nothing into a pre-reduce one.
/// </summary>
internal readonly record struct ParallelOperator(ParallelOperatorKind Kind, TensorLayout From, TensorLayout To)
{
    /// <summary>Every legal transition.</summary>
    public static IReadOnlyList<ParallelOperator> All { get; } =
    [
        new(ParallelOperatorKind.Partition, TensorLayout.Whole, TensorLayout.SplitRows),
        new(ParallelOperatorKind.Partition, TensorLayout.Whole, TensorLayout.SplitColumns),
        new(ParallelOperatorKind.Combine, TensorLayout.SplitRows, TensorLayout.Whole),
        new(ParallelOperatorKind.Combine, TensorLayout.SplitColumns, TensorLayout.Whole),
        new(ParallelOperatorKind.Replicate, TensorLayout.Whole, TensorLayout.Replicated),
        new(ParallelOperatorKind.Reduce, TensorLayout.PreReduce, TensorLayout.Whole),
        new(ParallelOperatorKind.AllReduce, TensorLayout.PreReduce, TensorLayout.Replicated),
        new(ParallelOperatorKind.AllGather, TensorLayout.SplitRows, TensorLayout.Replicated),
        new(ParallelOperatorKind.AllGather, TensorLayout.SplitColumns, TensorLayout.Replicated),
        new(ParallelOperatorKind.ReduceScatter, TensorLayout.PreReduce, TensorLayout.SplitRows),
        new(ParallelOperatorKind.ReduceScatter, TensorLayout.PreReduce, TensorLayout.SplitColumns),
        new(ParallelOperatorKind.AllToAll, TensorLayout.SplitRows, TensorLayout.SplitColumns),
        new(ParallelOperatorKind.AllToAll, TensorLayout.SplitColumns, TensorLayout.SplitRows),
    ];

    /// <summary>The operators of Unity, which the collectives compose.</summary>
    public static IReadOnlyList<ParallelOperator> Basic { get; } =
        [.. All.Where(o => o.Kind <= ParallelOperatorKind.Reduce)];

    /// <summary>Name and, where an operator has two forms, the dimension: "reduce-scatter(hidden)".</summary>
    public string Label => Kind switch
    {
        ParallelOperatorKind.Partition => $"partition({Dimension(To)})",
        ParallelOperatorKind.Combine => $"combine({Dimension(From)})",
        ParallelOperatorKind.Replicate => "replicate",
        ParallelOperatorKind.Reduce => "reduce",
        ParallelOperatorKind.AllReduce => "all-reduce",
        ParallelOperatorKind.AllGather => $"all-gather({Dimension(From)})",
        ParallelOperatorKind.ReduceScatter => $"reduce-scatter({Dimension(To)})",
        ParallelOperatorKind.AllToAll => $"all-to-all({Dimension(From)},{Dimension(To)})",
        _ => throw new ArgumentOutOfRangeException(nameof(Kind), Kind, "Name the new operator here."),
    };

    /// <summary>
    /// Elements that a rank sends per token of <paramref name="width"/> elements (ring algorithms; slices of an all-to-all go
    /// straight to their owner). A whole tensor that all ranks have costs nothing to slice or to call replicated.
    /// </summary>
    public double ElementsSent(int width, int ranks, bool sourceEverywhere)
    {
        double ring = (ranks - 1.0) * width / ranks;
        return Kind switch
        {
            ParallelOperatorKind.Partition or ParallelOperatorKind.Replicate => sourceEverywhere ? 0 : ring,
            ParallelOperatorKind.AllReduce => 2 * ring,
            ParallelOperatorKind.AllToAll => ring / ranks,
            _ => ring,
        };
    }

    /// <summary>
    /// How the gradient of <see cref="To"/>, laid out as given, becomes the gradient of <see cref="From"/>. Every partial of a
    /// pre-reduce value has the gradient of the sum, so that one is wanted replicated. A replicated gradient is already on each
    /// rank, which keeps its share (no operator); otherwise the operator is the legal one between the two layouts.
    /// </summary>
    public (ParallelOperator? Move, TensorLayout Result) Backward(TensorLayout gradient)
    {
        TensorLayout result = From == TensorLayout.PreReduce ? TensorLayout.Replicated : From;
        if (gradient == TensorLayout.Replicated)
        {
            return (null, result);
        }

        Check.That(gradient == To || (gradient == TensorLayout.PreReduce && To == TensorLayout.Replicated));
        return (All.Single(o => o.From == gradient && o.To == result), result);
    }

    private static string Dimension(TensorLayout split) => split == TensorLayout.SplitRows ? "tokens" : "hidden";
}
