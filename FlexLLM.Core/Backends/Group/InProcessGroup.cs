namespace FlexLLM.Backends.Group;

/// <summary>
/// A group whose ranks are threads of this process, each with a backend of its own. Backends of one
/// <see cref="IComputeBackend.PeerKind"/> read each other's memory; values of others travel through the host, so any backend will do.
/// Sums take the ranks in ascending order for every element, with the same bits either way. A rank that throws fails the group:
/// the others get a <see cref="FlexLlmException"/> that names it instead of waiting, and so does every run until <see cref="Recover"/>.
/// </summary>
internal sealed class InProcessGroup : IDisposable
{
    private RankBarrier _barrier;
    private readonly RankThreads _threads;
    private readonly Member[] _members;

    /// <summary>A group with a rank for each backend. The caller keeps the backends and disposes them after the group.</summary>
    public InProcessGroup(IReadOnlyList<IComputeBackend> backends)
    {
        ArgumentOutOfRangeException.ThrowIfZero(backends.Count);
        _barrier = new RankBarrier(backends.Count);
        RankPort[] ports = RankPort.Of(backends);
        _members = [.. backends.Select((backend, rank) => new Member(this, backend, ports[rank], rank, backends.Count))];
        _threads = new RankThreads(backends.Count);
    }

    public int Ranks => _members.Length;

    /// <summary>The ranks read each other's memory, without the host between them.</summary>
    public bool IsDirect => _members[0].IsDirect;

    public Communicator this[int rank] => _members[rank];

    /// <summary>
    /// Runs the body on each rank, on threads that stay the same, and waits for all. What made the group fail is thrown, be it an
    /// exception of a body or a cancellation; ranks that neither return nor call a collective are waited for.
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

    /// <summary>
    /// Makes the memory that an all-reduce of so many elements a rank needs on each device exactly that, between two runs. Without a
    /// reservation, or beyond it, it grows on demand.
    /// </summary>
    public void ReserveRoom(int count)
    {
        foreach (Member member in _members)
        {
            member.ReserveRoom(count);
        }
    }

    /// <summary>After a run that threw: no body runs any more, and the next run starts as if there had been no failure.</summary>
    public void Recover() => _barrier = new RankBarrier(Ranks);

    /// <summary>Ends a run in progress with an exception, and the threads.</summary>
    public void Dispose()
    {
        _barrier.Fail("The group has been disposed.", null);
        _threads.Dispose();
        _barrier.WaitForReaders();
        foreach (Member member in _members)
        {
            member.Close();
        }
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

    private IEnumerable<string> Calls() => _members.Select(member => $"rank {member.Rank} {member.Call}");

    /// <summary>
    /// Every call meets twice: after the first time what was posted may be read, after the second it may be written again. An all-reduce
    /// meets between its halves: then all have read what was posted, and the shares of the sum may be read; they are written again after
    /// the first meeting of a later call, to which whoever reads them comes afterwards.
    /// </summary>
    private sealed class Member(InProcessGroup group, IComputeBackend backend, RankPort port, int rank, int ranks)
        : Communicator(rank, ranks)
    {
        private TensorSlice _posted;
        private TensorSlice _share;

        public bool IsDirect => port is DevicePort;

        public Collective Call { get; private set; }

        public void ReserveRoom(int count) => port.Reserve(count);

        public void Close() => port.Dispose();

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
                group._barrier.WaitForReaders();
                throw;
            }
        }

        private void Exchange(in Collective call, TensorSlice source, TensorSlice destination)
        {
            (_posted, Call) = (port.Post(source), call);
            group._barrier.Meet(Rank);
            CheckCalls(call);
            if (call.Kind == CollectiveKind.AllReduce)
            {
                // Each rank sums a share of the elements for all: a reduce-scatter, then an all-gather, of one column.
                int length = checked(call.Rows * call.Columns);
                ReadShare(new Collective(CollectiveKind.ReduceScatterRows, length, 1));
                group._barrier.Meet(Rank);
                ReadAll(new Collective(CollectiveKind.AllGatherRows, length, 1), destination, ofShares: true);
            }
            else
            {
                ReadAll(call, destination, ofShares: false);
                group._barrier.Meet(Rank);
            }
        }

        /// <summary>All ranks compare the same calls, so either all go on or none does.</summary>
        private void CheckCalls(in Collective call)
        {
            foreach (Member other in group._members)
            {
                if (other.Call != call)
                {
                    group._barrier.Fail($"The ranks make different calls: {string.Join(", ", group.Calls())}.", null);
                    group._barrier.ThrowIfFailed();
                }
            }
        }

        private void ReadShare(in Collective call)
        {
            using RankBarrier.Reading reading = group._barrier.StartReading();
            _share = port.Room(call.DestinationOf(Rank, Ranks).Rows.Count);
            Read(call, _share, ofShares: false);
        }

        private void ReadAll(in Collective call, TensorSlice destination, bool ofShares)
        {
            using RankBarrier.Reading reading = group._barrier.StartReading();
            Read(call, port.Target(destination), ofShares);
            port.Deliver(destination);
        }

        /// <summary>Takes this rank's block of the call, from all ranks in ascending order.</summary>
        private void Read(in Collective call, TensorSlice target, bool ofShares)
        {
            Block takes = call.DestinationOf(Rank, Ranks);
            foreach (Member other in group._members)
            {
                Block brings = call.SourceOf(other.Rank, Ranks);
                Block common = brings.Intersect(takes);
                (Rectangle from, Rectangle to) = (brings.Locate(common), takes.Locate(common));
                if (!from.IsEmpty)
                {
                    bool isOneRow = from.IsDense && to.IsDense;
                    port.Read(
                        ofShares ? other._share : other._posted, isOneRow ? from.AsOneRow() : from, target,
                        isOneRow ? to.AsOneRow() : to, accumulate: call.Sums && other.Rank > 0);
                }
            }
        }
    }
}
