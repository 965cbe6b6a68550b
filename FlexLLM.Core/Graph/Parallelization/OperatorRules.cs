using FlexLLM.Primitives;

namespace FlexLLM.Graph.Parallelization;

/// <summary>One legal way to run an operator: layouts of its input, its output and, for a linear, its weight (OUT, IN).</summary>
internal sealed record OperatorCase(int Number, TensorLayout Input, TensorLayout Output, TensorLayout? Weight = null)
{
    /// <summary>Does a rank do only its share of the arithmetic?</summary>
    public bool IsShared => Input.IsSplit || Output.IsSplit || Weight is { IsSplit: true };
}

/// <summary>Which layouts each operator accepts and what comes out (paper.md b.2), forward and backward.</summary>
internal static class OperatorRules
{
    /// <summary>Y = X W^T. Case 5 holds because the product is linear in X; a bias would be added once per rank.</summary>
    public static IReadOnlyList<OperatorCase> Linear { get; } =
    [
        new(1, TensorLayout.Replicated, TensorLayout.Replicated, TensorLayout.Replicated),
        new(2, TensorLayout.SplitColumns, TensorLayout.PreReduce, TensorLayout.SplitColumns), // Row parallel.
        new(3, TensorLayout.SplitRows, TensorLayout.SplitRows, TensorLayout.Replicated),      // Token parallel.
        new(4, TensorLayout.Replicated, TensorLayout.SplitColumns, TensorLayout.SplitRows),   // Column parallel.
        new(5, TensorLayout.PreReduce, TensorLayout.PreReduce, TensorLayout.Replicated),
    ];

    /// <summary>f(sum) is not the sum of f, so every layout but pre-reduce; the same comes out.</summary>
    public static IReadOnlyList<OperatorCase> ElementwiseNonlinear { get; } = Unchanged(l => l != TensorLayout.PreReduce);

    public static IReadOnlyList<OperatorCase> ElementwiseLinear { get; } = Unchanged(_ => true);

    /// <summary>A row's mean square needs the whole row.</summary>
    public static IReadOnlyList<OperatorCase> RmsNorm { get; } =
        Unchanged(l => l != TensorLayout.PreReduce && l != TensorLayout.SplitColumns);

    /// <summary>Tokens read each other, so only whole heads can be divided, and key/value heads with their query heads.</summary>
    public static IReadOnlyList<OperatorCase> Attention(int queryHeads, int keyValueHeads, int ranks)
    {
        bool byHeads = queryHeads % ranks == 0 && keyValueHeads % ranks == 0;
        return Unchanged(l => l == TensorLayout.SplitColumns ? byHeads : l.Replica != ShardState.PreReduce && !l.IsSplit);
    }

    /// <summary>
    /// The layout of a + b, or null where they may not be added. Every rank that adds a replicated value to a partial adds it
    /// once more to the sum; only with <paramref name="onOneRank"/> is that legal.
    /// </summary>
    public static TensorLayout? Add(TensorLayout a, TensorLayout b, bool onOneRank = false)
    {
        if (a == b)
        {
            return a;
        }

        bool partialAndCopy = (a == TensorLayout.PreReduce && b == TensorLayout.Replicated)
            || (a == TensorLayout.Replicated && b == TensorLayout.PreReduce);
        return partialAndCopy && onOneRank ? TensorLayout.PreReduce : null;
    }

    /// <summary>
    /// dX = G W and dW = G^T X for a linear in the given case: the layout of dX, and whether a rank's dW is only a partial that
    /// has to be summed over the ranks before the optimizer step.
    /// </summary>
    public static (TensorLayout InputGradient, bool WeightGradientIsPartial) LinearBackward(
        OperatorCase linear, TensorLayout gradient)
    {
        Check.That(gradient == GradientOf(linear.Output) || (linear.Number == 1 && gradient == TensorLayout.PreReduce));
        return linear.Number switch
        {
            1 => (gradient, gradient == TensorLayout.PreReduce),
            2 => (TensorLayout.SplitColumns, false),
            3 => (TensorLayout.SplitRows, true),
            4 => (TensorLayout.PreReduce, false),
            5 => (TensorLayout.Replicated, true),
            _ => throw new ArgumentOutOfRangeException(nameof(linear), linear.Number, "No such linear case."),
        };
    }

    private static TensorLayout GradientOf(TensorLayout value) =>
        value == TensorLayout.PreReduce ? TensorLayout.Replicated : value;

    private static OperatorCase[] Unchanged(Func<TensorLayout, bool> accepts) =>
        [.. TensorLayout.Legal.Where(accepts).Select(layout => new OperatorCase(0, layout, layout))];
}
