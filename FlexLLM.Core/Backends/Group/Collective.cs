using FlexLLM.Primitives;

namespace FlexLLM.Backends.Group;

/// <summary>What a group can do together. Rows are tokens, columns the hidden dimension.</summary>
internal enum CollectiveKind
{
    AllReduce,
    AllGatherRows,
    AllGatherColumns,
    ReduceScatterRows,
    ReduceScatterColumns,
    RowsToColumns,
    ColumnsToRows,
}

/// <summary>The part of a value [rows, columns] that one rank sends or receives.</summary>
internal readonly record struct Block(Shard Rows, Shard Columns)
{
    public Block Intersect(Block other) => new(Rows.Intersect(other.Rows), Columns.Intersect(other.Columns));

    /// <summary>Where a part of this block lies in memory that holds the block.</summary>
    public Rectangle Locate(Block part)
    {
        int stride = Columns.Count;
        long start = ((long)(part.Rows.Start - Rows.Start) * stride) + part.Columns.Start - Columns.Start;
        return new Rectangle(start, part.Rows.Count, part.Columns.Count, stride);
    }
}

/// <summary>
/// One call of a group: the operation and the shape of the whole value, equal on every rank. Which block a rank brings and which
/// it takes follows from that, and is the definition of each operation: a rank receives every element of its destination block
/// from the rank that has it, or the sum over all ranks where each brings a partial of the whole.
/// </summary>
internal readonly record struct Collective(CollectiveKind Kind, int Rows, int Columns)
{
    private enum Cut
    {
        Whole,
        ByRows,
        ByColumns,
    }

    public bool Sums =>
        Kind is CollectiveKind.AllReduce or CollectiveKind.ReduceScatterRows or CollectiveKind.ReduceScatterColumns;

    public Block SourceOf(int rank, int ranks) => BlockOf(Cuts.Source, rank, ranks);

    public Block DestinationOf(int rank, int ranks) => BlockOf(Cuts.Destination, rank, ranks);

    public override string ToString() => $"{Kind} [{Rows}, {Columns}]";

    private (Cut Source, Cut Destination) Cuts => Kind switch
    {
        CollectiveKind.AllReduce => (Cut.Whole, Cut.Whole),
        CollectiveKind.AllGatherRows => (Cut.ByRows, Cut.Whole),
        CollectiveKind.AllGatherColumns => (Cut.ByColumns, Cut.Whole),
        CollectiveKind.ReduceScatterRows => (Cut.Whole, Cut.ByRows),
        CollectiveKind.ReduceScatterColumns => (Cut.Whole, Cut.ByColumns),
        CollectiveKind.RowsToColumns => (Cut.ByRows, Cut.ByColumns),
        CollectiveKind.ColumnsToRows => (Cut.ByColumns, Cut.ByRows),
        _ => throw new ArgumentOutOfRangeException(nameof(Kind), Kind, "Say what each rank brings and takes."),
    };

    private Block BlockOf(Cut cut, int rank, int ranks)
    {
        Check.That(cut != Cut.ByColumns || Columns % ranks == 0);
        return new Block(
            cut == Cut.ByRows ? Shard.Of(Rows, rank, ranks) : Shard.All(Rows),
            cut == Cut.ByColumns ? Shard.Of(Columns, rank, ranks) : Shard.All(Columns));
    }
}
