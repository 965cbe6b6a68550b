using System.Numerics.Tensors;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Group;

/// <summary>
/// A group whose ranks are threads of this process, each with a backend of its own kind; values travel through host memory, so
/// any backend will do. Sums take the ranks in ascending order for every element. A rank that throws fails the group for good:
/// the others get a <see cref="FlexLlmException"/> that names it instead of waiting.
/// </summary>
internal sealed class InProcessGroup : IDisposable
{
    private readonly RankBarrier _barrier;
    private readonly RankThreads _threads;
    private readonly Member[] _members;
    private readonly float[][] _sums = [[], []];

    /// <summary>A group with a rank for each backend. The caller keeps the backends and disposes them after the group.</summary>
    public InProcessGroup(IReadOnlyList<IComputeBackend> backends)
    {
        ArgumentOutOfRangeException.ThrowIfZero(backends.Count);
        _barrier = new RankBarrier(backends.Count);
        _members = [.. backends.Select((backend, rank) => new Member(this, backend, rank, backends.Count))];
        _threads = new RankThreads(backends.Count);
    }

    public int Ranks => _members.Length;

    public Communicator this[int rank] => _members[rank];

    /// <summary>
    /// Runs the body on each rank, on threads that stay the same, and waits for all. What made the group fail is thrown, be it an
    /// exception of a body or a cancellation; ranks that neither return nor call a collective are waited for. Bodies that use the
    /// communicators outside of a run must call <see cref="Fail"/> themselves.
    /// </summary>
    public void Run(Action<Communicator> body, CancellationToken cancellationToken = default)
    {
        cancellationToken.ThrowIfCancellationRequested();
        _barrier.Open();
        using CancellationTokenRegistration registration = cancellationToken.Register(() =>
            _barrier.Fail("The group's work was cancelled.", new OperationCanceledException(cancellationToken)));
        try
        {
            _threads.Run(rank => body(_members[rank]), Ended);
            _barrier.ThrowIfFailed();
        }
        catch (Exception) when (_barrier.Cause is not null)
        {
            _barrier.Cause.Throw();
        }
    }

    /// <summary>Says that a rank cannot go on.</summary>
    public void Fail(int rank, Exception cause) => _barrier.Fail(rank, cause);

    /// <summary>Ends a run in progress with an exception, and the threads.</summary>
    public void Dispose()
    {
        _barrier.Fail("The group has been disposed.", null);
        _threads.Dispose();
    }

    private void Ended(int rank, Exception? failure)
    {
        if (failure is null)
        {
            _barrier.Leave(rank);
        }
        else
        {
            _barrier.Fail(rank, failure);
        }
    }

    private IEnumerable<string> Calls(int slot) => _members.Select(member => $"rank {member.Rank} {member.Call(slot)}");

    /// <summary>
    /// Posts what a rank brings, meets the others, and reads theirs. Buffers alternate between two slots: whoever posts a call has
    /// met the others in the call before, and they came there after reading the one before that.
    /// </summary>
    private sealed class Member(InProcessGroup group, IComputeBackend backend, int rank, int ranks) : Communicator(rank, ranks)
    {
        private readonly float[][] _sent = [[], []];
        private readonly Collective[] _calls = new Collective[2];
        private float[] _received = [];
        private int _slot;

        public Collective Call(int slot) => _calls[slot];

        protected override void Run(in Collective call, TensorSlice source, TensorSlice destination)
        {
            try
            {
                group._barrier.ThrowIfFailed();
                CheckShapes(call, source, destination);
                if (Ranks > 1)
                {
                    Exchange(call, source, destination);
                }
                else if (call.Kind != CollectiveKind.AllReduce)
                {
                    backend.Copy(source, destination);
                }
            }
            catch (Exception e)
            {
                group._barrier.Fail(Rank, e);
                throw;
            }
        }

        private void Exchange(in Collective call, TensorSlice source, TensorSlice destination)
        {
            Post(call, source);
            group._barrier.Meet(Rank);
            CheckCalls(call);
            if (call.Kind == CollectiveKind.AllReduce)
            {
                // Each rank sums one stretch of elements for all.
                int length = call.Rows * call.Columns;
                Shard mine = Shard.Of(length, Rank, Ranks);
                SumInRankOrder(new Block(Shard.All(1), mine), length, group._sums[_slot].AsSpan(mine.Start, mine.Count));
                group._barrier.Meet(Rank);
                backend.Upload(group._sums[_slot].AsSpan(0, length), destination);
            }
            else
            {
                Block block = call.DestinationOf(Rank, Ranks);
                Span<float> received = Sized(ref _received, destination);
                if (call.Sums)
                {
                    SumInRankOrder(block, call.Columns, received);
                }
                else
                {
                    CopyBlocks(call, block, received);
                }

                backend.Upload(received, destination);
            }
        }

        private void Post(in Collective call, TensorSlice source)
        {
            _slot ^= 1;
            _calls[_slot] = call;
            backend.Download(source, Sized(ref _sent[_slot], source));
            if (call.Kind == CollectiveKind.AllReduce && Rank == 0)
            {
                Sized(ref group._sums[_slot], source);
            }
        }

        /// <summary>All ranks compare the same calls, so either all go on or none does.</summary>
        private void CheckCalls(in Collective call)
        {
            foreach (Member other in group._members)
            {
                if (other.Call(_slot) != call)
                {
                    group._barrier.Fail($"The ranks make different calls: {string.Join(", ", group.Calls(_slot))}.", null);
                    group._barrier.ThrowIfFailed();
                }
            }
        }

        /// <summary>A block of the sum of what all posted, each a whole of <paramref name="columns"/> columns.</summary>
        private void SumInRankOrder(Block block, int columns, Span<float> sum)
        {
            for (int i = 0; i < block.Rows.Count; i++)
            {
                int first = ((block.Rows.Start + i) * columns) + block.Columns.Start;
                Span<float> row = sum.Slice(i * block.Columns.Count, block.Columns.Count);
                group._members[0].Sent(_slot, first, row.Length).CopyTo(row);
                for (int from = 1; from < Ranks; from++)
                {
                    TensorPrimitives.Add(row, group._members[from].Sent(_slot, first, row.Length), row);
                }
            }
        }

        private void CopyBlocks(in Collective call, Block block, Span<float> received)
        {
            foreach (Member from in group._members)
            {
                Block source = call.SourceOf(from.Rank, Ranks);
                Block common = source.Intersect(block);
                for (int row = common.Rows.Start; row < common.Rows.End; row++)
                {
                    int sent = ((row - source.Rows.Start) * source.Columns.Count) + common.Columns.Start - source.Columns.Start;
                    int at = ((row - block.Rows.Start) * block.Columns.Count) + common.Columns.Start - block.Columns.Start;
                    from.Sent(_slot, sent, common.Columns.Count).CopyTo(received[at..]);
                }
            }
        }

        private ReadOnlySpan<float> Sent(int slot, int start, int count) => _sent[slot].AsSpan(start, count);

        private static Span<float> Sized(ref float[] buffer, TensorSlice slice)
        {
            int length = checked(slice.Rows * slice.Columns);
            if (buffer.Length < length)
            {
                buffer = new float[length];
            }

            return buffer.AsSpan(0, length);
        }
    }
}
