using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Graph;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>Carries out changes of layout on one rank of a group.</summary>
internal static class Moves
{
    /// <summary>The rank's share of rows.</summary>
    public static Shard RowsOf(Communicator communicator, int rows) => Shard.Of(rows, communicator.Rank, communicator.Ranks);

    /// <summary>Source and destination are the rank's own; they are the same where nothing needs to move.</summary>
    /// <param name="backend">The rank's device.</param>
    /// <param name="group">The other ranks; one device alone only passes values on.</param>
    /// <param name="move">What to do.</param>
    /// <param name="source">Rows to read.</param>
    /// <param name="destination">Rows to write.</param>
    public static void Run(
        IComputeBackend backend, Communicator? group, MoveKind move, TensorSlice source, TensorSlice destination)
    {
        if ((move is MoveKind.Pass or MoveKind.AllReduce) && source != destination)
        {
            backend.Copy(source, destination);
        }

        if (move == MoveKind.Pass)
        {
            return;
        }

        Check.That(group is not null);
        Communicator communicator = group;
        switch (move)
        {
            case MoveKind.AllReduce:
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
                Shard taken = RowsOf(communicator, source.Rows);
                backend.Copy(source.Slice(taken.Start, taken.Count), destination);
                break;
            case MoveKind.TakeColumns:
                Shard columns = Shard.Of(source.Columns, communicator.Rank, communicator.Ranks);
                backend.CopyColumns(source, columns.Start, destination, 0, columns.Count);
                break;
            case MoveKind.PlaceRows:
                Shard placed = RowsOf(communicator, destination.Rows);
                backend.Zero(destination);
                backend.Copy(source, destination.Slice(placed.Start, placed.Count));
                break;
            case MoveKind.PlaceColumns:
                Shard place = Shard.Of(destination.Columns, communicator.Rank, communicator.Ranks);
                backend.Zero(destination);
                backend.CopyColumns(source, 0, destination, place.Start, place.Count);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(move), move, "Carry out the new move here.");
        }
    }
}
