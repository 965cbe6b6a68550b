using FlexLLM.Primitives;

namespace FlexLLM.Graph.Parallelization;

/// <summary>
/// One legal way to run an operator: layouts of its input, its output and its weight: (OUT, IN) of a linear, one row of columns
/// for a vector. Cases 1 to 5 are the paper's of a linear, 6 to 9 those of a vector; an operator without weights has number 0.
/// </summary>
internal sealed record OperatorCase(int Number, TensorLayout Input, TensorLayout Output, TensorLayout? Weight = null)
{
    /// <summary>Does a rank do only its share of the arithmetic?</summary>
    public bool IsShared => Input.IsSplit || Output.IsSplit || Weight is { IsSplit: true };
}

/// <summary>
/// The bias [1, OUT] of a linear in one of its cases: how the ranks hold it, and whether rank 0 alone adds it. Where the output is
/// a partial a bias may enter the sum once; every rank still keeps a copy and, as the gradient of a sum is the same everywhere,
/// brings it up to date by itself.
/// </summary>
internal readonly record struct BiasRule(TensorLayout Layout, bool OnRankZeroOnly);

/// <summary>
/// Layout of dX, and whether a rank's gradient of weight or bias is only a partial, to be summed over the ranks once per
/// optimizer step.
/// </summary>
internal readonly record struct GradientRule(TensorLayout Input, bool WeightIsPartial, bool BiasIsPartial);

/// <summary>Which layouts each operator accepts and what comes out (paper.md b.2), forward and backward.</summary>
internal static class OperatorRules
{
    /// <summary>Y = X W^T + b. Case 5 holds because the product is linear in X. For b see <see cref="BiasOf"/>.</summary>
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

    /// <summary>Y = X * s for a vector s: wherever X may be, s lies along its columns.</summary>
    public static IReadOnlyList<OperatorCase> ElementwiseLinear { get; } =
    [
        new(6, TensorLayout.Replicated, TensorLayout.Replicated, TensorLayout.Replicated),
        new(7, TensorLayout.SplitRows, TensorLayout.SplitRows, TensorLayout.Replicated),
        new(8, TensorLayout.SplitColumns, TensorLayout.SplitColumns, TensorLayout.SplitColumns),
        new(9, TensorLayout.PreReduce, TensorLayout.PreReduce, TensorLayout.Replicated),
    ];

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

    /// <summary>Who holds and who adds the bias of a linear in the given case.</summary>
    public static BiasRule BiasOf(OperatorCase linear) => linear.Number switch
    {
        1 or 3 => new(TensorLayout.Replicated, false),
        2 or 5 => new(TensorLayout.Replicated, true),
        4 => new(TensorLayout.SplitColumns, false),
        _ => throw new ArgumentOutOfRangeException(nameof(linear), linear.Number, "No such linear case."),
    };

    /// <summary>
    /// An operator with weights in the given case: dX = G W, dW = G^T X, db = the sum of G over tokens; for a vector dX = G * s,
    /// ds = the sum of G * X over tokens.
    /// </summary>
    public static GradientRule Backward(OperatorCase weighted, TensorLayout gradient)
    {
        bool isPartial = gradient == TensorLayout.PreReduce;
        Check.That(gradient == GradientOf(weighted.Output) || (weighted.Number is 1 or 6 && isPartial));
        return weighted.Number switch
        {
            1 => new(gradient, isPartial, isPartial),
            2 => new(TensorLayout.SplitColumns, false, false),
            3 => new(TensorLayout.SplitRows, true, true),
            4 => new(TensorLayout.PreReduce, false, false),
            5 => new(TensorLayout.Replicated, true, false), // X is a partial, G is not.
            6 => new(gradient, isPartial, false),
            7 => new(TensorLayout.SplitRows, true, false),
            8 => new(TensorLayout.SplitColumns, false, false),
            9 => new(TensorLayout.Replicated, true, false),
            _ => throw new ArgumentOutOfRangeException(nameof(weighted), weighted.Number, "No such case."),
        };
    }

    private static TensorLayout GradientOf(TensorLayout value) =>
        value == TensorLayout.PreReduce ? TensorLayout.Replicated : value;

    private static OperatorCase[] Unchanged(Func<TensorLayout, bool> accepts) =>
        [.. TensorLayout.Legal.Where(accepts).Select(layout => new OperatorCase(0, layout, layout))];
}
