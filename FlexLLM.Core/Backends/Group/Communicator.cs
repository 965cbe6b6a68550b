using FlexLLM.Primitives;

namespace FlexLLM.Backends.Group;

/// <summary>
/// One rank's view of a group of devices that work on the same batch: the collectives that a parallel plan is lowered to. All
/// ranks make the same calls in the same order, each on tensors of its own backend and from one thread at a time. Rank r of p
/// has rows [rows r / p, rows (r + 1) / p) of a value cut by rows, which may be none, and an even slice of one cut by columns
/// (<see cref="Shard"/>). A destination must not overlap its source. When a call returns, the rank's backend may be called to read its
/// destination and to write its source again; a call that fails on one rank fails on all.
/// </summary>
/// <remarks>
/// A sum takes the ranks in ascending order for every element, if the implementation promises bits: repeated runs agree, all
/// ranks agree, and an all-reduce equals a reduce-scatter followed by an all-gather. <see cref="InProcessGroup"/> does.
/// </remarks>
internal abstract class Communicator(int rank, int ranks)
{
    public int Rank { get; } = rank;

    public int Ranks { get; } = ranks;

    /// <summary>x = the sum of all ranks' x. x [rows, n].</summary>
    public void AllReduce(TensorSlice x) => Run(new(CollectiveKind.AllReduce, x.Rows, x.Columns), x, x);

    /// <summary>whole = all ranks' parts, one below the other. part [rows / p, n], whole [rows, n].</summary>
    public void AllGatherRows(TensorSlice part, TensorSlice whole) =>
        Run(new(CollectiveKind.AllGatherRows, whole.Rows, whole.Columns), part, whole);

    /// <summary>whole = all ranks' parts side by side. part [rows, n / p], whole [rows, n].</summary>
    public void AllGatherColumns(TensorSlice part, TensorSlice whole) =>
        Run(new(CollectiveKind.AllGatherColumns, whole.Rows, whole.Columns), part, whole);

    /// <summary>part = this rank's rows of the sum of all ranks' partials. partial [rows, n], part [rows / p, n].</summary>
    public void ReduceScatterRows(TensorSlice partial, TensorSlice part) =>
        Run(new(CollectiveKind.ReduceScatterRows, partial.Rows, partial.Columns), partial, part);

    /// <summary>part = this rank's columns of the sum of all ranks' partials. partial [rows, n], part [rows, n / p].</summary>
    public void ReduceScatterColumns(TensorSlice partial, TensorSlice part) =>
        Run(new(CollectiveKind.ReduceScatterColumns, partial.Rows, partial.Columns), partial, part);

    /// <summary>A value cut by rows becomes cut by columns. rowsPart [rows / p, n], columnsPart [rows, n / p].</summary>
    public void AllToAllRowsToColumns(TensorSlice rowsPart, TensorSlice columnsPart) =>
        Run(new(CollectiveKind.RowsToColumns, columnsPart.Rows, rowsPart.Columns), rowsPart, columnsPart);

    /// <summary>A value cut by columns becomes cut by rows. columnsPart [rows, n / p], rowsPart [rows / p, n].</summary>
    public void AllToAllColumnsToRows(TensorSlice columnsPart, TensorSlice rowsPart) =>
        Run(new(CollectiveKind.ColumnsToRows, columnsPart.Rows, rowsPart.Columns), columnsPart, rowsPart);

    /// <summary>
    /// All that an implementation writes. It checks that the slices are this rank's blocks of the call, and where it can that all
    /// ranks make the same call.
    /// </summary>
    protected abstract void Run(in Collective call, TensorSlice source, TensorSlice destination);

    /// <summary>Does this rank bring and take the shapes that the call gives it?</summary>
    protected void CheckShapes(in Collective call, TensorSlice source, TensorSlice destination)
    {
        Block brings = call.SourceOf(Rank, Ranks);
        Block takes = call.DestinationOf(Rank, Ranks);
        Check.That((source.Rows, source.Columns) == (brings.Rows.Count, brings.Columns.Count));
        Check.That((destination.Rows, destination.Columns) == (takes.Rows.Count, takes.Columns.Count));
    }
}
