using FlexLLM.Primitives;

namespace FlexLLM.Graph.Parallelization;

/// <summary>What the ranks of a tensor-parallel group hold along one dimension of a tensor.</summary>
internal enum ShardState
{
    /// <summary>'-': the whole dimension, not divided.</summary>
    NonParallel,

    /// <summary>'|': rank i holds slice i.</summary>
    Partitioned,

    /// <summary>'=': every rank holds an identical full copy.</summary>
    Replicated,

    /// <summary>'+': every rank holds a partial of full shape; the value is the sum over ranks.</summary>
    PreReduce,
}

/// <summary>
/// States of the three dimensions [replica, rows, columns]. Of an activation rows are tokens and columns the hidden
/// dimension; of a weight rows are OUT and columns IN. Printed and parsed as in the paper: "[-,-,|]".
/// </summary>
internal readonly record struct TensorLayout(ShardState Replica, ShardState Rows, ShardState Columns)
{
    private const string Symbols = "-|=+";

    /// <summary>[-,-,-]: one logical tensor. Whether its bytes lie on one rank or on all is up to its producer.</summary>
    public static TensorLayout Whole => default;

    public static TensorLayout Replicated => new(ShardState.Replicated, ShardState.NonParallel, ShardState.NonParallel);

    public static TensorLayout PreReduce => new(ShardState.PreReduce, ShardState.NonParallel, ShardState.NonParallel);

    /// <summary>[-,|,-]: activations split by tokens, weights by OUT.</summary>
    public static TensorLayout SplitRows => new(ShardState.NonParallel, ShardState.Partitioned, ShardState.NonParallel);

    /// <summary>[-,-,|]: activations split by hidden columns, weights by IN.</summary>
    public static TensorLayout SplitColumns => new(ShardState.NonParallel, ShardState.NonParallel, ShardState.Partitioned);

    /// <summary>Every legal layout: one group of ranks parallelizes at most one dimension.</summary>
    public static IReadOnlyList<TensorLayout> Legal { get; } = [Whole, Replicated, PreReduce, SplitRows, SplitColumns];

    public bool IsLegal =>
        Replica is ShardState.NonParallel or ShardState.Replicated or ShardState.PreReduce
        && Rows is ShardState.NonParallel or ShardState.Partitioned
        && Columns is ShardState.NonParallel or ShardState.Partitioned
        && ParallelDimensions <= 1;

    public bool IsSplit => Rows == ShardState.Partitioned || Columns == ShardState.Partitioned;

    /// <summary>Which of the rows a rank holds: of tokens, slices may be ragged.</summary>
    public Shard RowsOn(int rank, int ranks, int rows) =>
        Rows == ShardState.Partitioned ? Shard.Of(rows, rank, ranks) : Shard.All(rows);

    /// <summary>Which of the columns a rank holds.</summary>
    public Shard ColumnsOn(int rank, int ranks, int columns) =>
        Columns == ShardState.Partitioned ? Shard.Of(columns, rank, ranks) : Shard.All(columns);

    private int ParallelDimensions =>
        (Replica == ShardState.NonParallel ? 0 : 1)
        + (Rows == ShardState.NonParallel ? 0 : 1)
        + (Columns == ShardState.NonParallel ? 0 : 1);

    /// <summary>Reads "[-,-,|]"; throws <see cref="FormatException"/> for other text and for an illegal layout.</summary>
    public static TensorLayout Parse(string text)
    {
        if (text is not ['[', char replica, ',', char rows, ',', char columns, ']'])
        {
            throw new FormatException($"'{text}' is not a layout such as [-,-,|].");
        }

        var layout = new TensorLayout(StateOf(replica), StateOf(rows), StateOf(columns));
        return layout.IsLegal ? layout : throw new FormatException($"'{text}' is no legal layout.");
    }

    public override string ToString() => $"[{Symbols[(int)Replica]},{Symbols[(int)Rows]},{Symbols[(int)Columns]}]";

    private static ShardState StateOf(char symbol)
    {
        int index = Symbols.IndexOf(symbol, StringComparison.Ordinal);
        return index >= 0 ? (ShardState)index : throw new FormatException($"'{symbol}' is no tensor state.");
    }
}
