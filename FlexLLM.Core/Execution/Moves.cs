using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Graph;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>Carries out changes of layout between the ranks of a group.</summary>
internal static class Moves
{
    /// <summary>Source and destination are the same where nothing needs to move.</summary>
    /// <param name="backend">The device; one alone only passes values on.</param>
    /// <param name="move">What to do.</param>
    /// <param name="source">Rows to read.</param>
    /// <param name="destination">Rows to write.</param>
    public static void Run(IComputeBackend backend, MoveKind move, TensorSlice source, TensorSlice destination)
    {
        if (move == MoveKind.Pass)
        {
            Pass(backend, source, destination);
            return;
        }

        var group = backend as GroupBackend;
        Check.That(group is not null);
        group.Note(rank => Run(rank, move, rank.Of(source), rank.Of(destination)));
    }

    private static void Pass(IComputeBackend backend, TensorSlice source, TensorSlice destination)
    {
        if (source != destination)
        {
            backend.Copy(source, destination);
        }
    }

    private static void Run(GroupRank rank, MoveKind move, TensorSlice source, TensorSlice destination)
    {
        (IComputeBackend backend, Communicator communicator) = (rank.Device, rank.Communicator);
        switch (move)
        {
            case MoveKind.AllReduce:
                Pass(backend, source, destination);
                communicator.AllReduce(destination);
                break;
            case MoveKind.AllGatherRows:
                communicator.AllGatherRows(source, destination);
                break;
            case MoveKind.AllGatherColumns:
                communicator.AllGatherColumns(source, destination);
                break;
            case MoveKind.ReduceScatterRows:
                communicator.ReduceScatterRows(source, destination);
                break;
            case MoveKind.ReduceScatterColumns:
                communicator.ReduceScatterColumns(source, destination);
                break;
            case MoveKind.RowsToColumns:
                communicator.AllToAllRowsToColumns(source, destination);
                break;
            case MoveKind.ColumnsToRows:
                communicator.AllToAllColumnsToRows(source, destination);
                break;
            case MoveKind.TakeRows:
                Shard taken = Shard.Of(source.Rows, rank.Index, rank.Count);
                backend.Copy(source.Slice(taken.Start, taken.Count), destination);
                break;
            case MoveKind.TakeColumns:
                Shard columns = Shard.Of(source.Columns, rank.Index, rank.Count);
                backend.CopyColumns(source, columns.Start, destination, 0, columns.Count);
                break;
            case MoveKind.PlaceRows:
                Shard placed = Shard.Of(destination.Rows, rank.Index, rank.Count);
                backend.Zero(destination);
                backend.Copy(source, destination.Slice(placed.Start, placed.Count));
                break;
            case MoveKind.PlaceColumns:
                Shard place = Shard.Of(destination.Columns, rank.Index, rank.Count);
                backend.Zero(destination);
                backend.CopyColumns(source, 0, destination, place.Start, place.Count);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(move), move, "Carry out the new move here.");
        }
    }
}
