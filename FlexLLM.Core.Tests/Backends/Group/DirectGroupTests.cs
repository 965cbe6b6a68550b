using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Primitives;
using FlexLLM.Tests.Contracts;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends.Group;

/// <summary>Ranks that read each other's memory: who does, that nothing else shows of it, and that nobody frees it meanwhile.</summary>
[DeviceFixture]
internal sealed class DirectGroupTests
{
    [Test]
    public void IsDirect_BackendsOfOneKind_ReadEachOther()
    {
        using IComputeBackend a = TestDevice.CreateRank(0);
        using IComputeBackend b = TestDevice.CreateRank(1);
        using IComputeBackend other = new Altered(TestDevice.CreateRank(2), kind: "another");
        Assert.That(Of(a, b), Is.True);
        Assert.That(Of(a, other), Is.False);
        Assert.That(Of(other, a), Is.False);
        Assert.That(Of(new Altered(a, kind: null), new Altered(b, kind: null)), Is.False, "None is no kind.");

        static bool Of(params IComputeBackend[] backends)
        {
            using var group = new InProcessGroup(backends);
            return group.IsDirect;
        }
    }

    [Test]
    public void Collective_FromMemoryToMemory_HasTheBitsOfTheWayThroughTheHost([Range(1, 4)] int ranks)
    {
        (CollectiveCall Call, Cut From, Cut To)[] calls =
        [
            ((c, from, to) => c.AllGatherRows(from, to), Rows, Whole),
            ((c, from, to) => c.AllGatherColumns(from, to), Columns, Whole),
            ((c, from, to) => c.ReduceScatterRows(from, to), Whole, Rows),
            ((c, from, to) => c.ReduceScatterColumns(from, to), Whole, Columns),
            ((c, from, to) => c.AllToAllRowsToColumns(from, to), Rows, Columns),
            ((c, from, to) => c.AllToAllColumnsToRows(from, to), Columns, Rows),
        ];
        var random = new SeededRandom((ulong)ranks);
        Piece[] values = [.. Enumerable.Range(0, ranks).Select(_ => Piece.Random(13, 24, ref random))];
        using var direct = new GroupRig(ranks);
        using var byHost = new GroupRig(ranks, isDirect: false);
        ExpectSame(rig => rig.AllReduce(values), "AllReduce");
        foreach (((CollectiveCall call, Cut from, Cut to), int index) in calls.Select((call, index) => (call, index)))
        {
            ExpectSame(
                rig => rig.Run(
                    call,
                    [.. values.Select((value, rank) => from(value, rank, ranks))],
                    rank => (to(values[0], rank, ranks).Rows, to(values[0], rank, ranks).Columns)),
                $"call {index}");
        }

        void ExpectSame(Func<GroupRig, Piece[]> run, string name)
        {
            Piece[] expected = run(byHost);
            Assert.That(run(direct).Select(piece => piece.Bits), Is.EqualTo(expected.Select(piece => piece.Bits)), name);
        }

        static Piece Whole(Piece value, int rank, int ranks) => value;
        static Piece Rows(Piece value, int rank, int ranks) => value.RowsOf(rank, ranks);
        static Piece Columns(Piece value, int rank, int ranks) => value.ColumnsOf(rank, ranks);
    }

    [Test]
    public void ReadPeer_AnyRectangle_MovesOrAddsItAndNothingElse([Range(0, 39)] int seed)
    {
        using IComputeBackend owner = TestDevice.CreateRank(0);
        using IComputeBackend reader = TestDevice.CreateRank(1);
        Assert.That(IsRead(owner, reader, seed), Is.True);
    }

    [Test]
    public void ReadPeer_Control_PlantedFaultsAreFound(
        [Values("adds what it should copy", "copies what it should add", "one place on", "without gaps", "a row less")] string fault)
    {
        using IComputeBackend owner = TestDevice.CreateRank(0);
        using IComputeBackend reader = new Altered(TestDevice.CreateRank(1), fault: fault);
        Assert.That(Enumerable.Range(0, 40).Count(seed => !IsRead(owner, reader, seed)), Is.GreaterThan(2));
    }

    [Test]
    public void Run_RankFailsWhileAnotherReads_StaysUntilThatIsDone([Values] bool cancelled)
    {
        using CancellationTokenSource source = new();
        using ManualResetEventSlim reads = new(false);
        using ManualResetEventSlim fails = new(false);
        int left = 0;
        int leftEarly = 0;
        bool isRead = false;
        using GroupRig rig = new(3, wrap: (rank, inner) => new Altered(inner, inner.PeerKind, probe: () =>
        {
            if (rank == 1 && !isRead)
            {
                isRead = true;
                reads.Set();
                fails.Wait();

                // Long enough for the others to leave, were they let go.
                SpinWait.SpinUntil(() => Volatile.Read(ref left) > 0, 50);
                leftEarly = Volatile.Read(ref left);
            }
            else if (rank == 0)
            {
                reads.Wait();
                fails.Set();
                if (!cancelled)
                {
                    throw new IOException("planted");
                }

                source.Cancel();
            }
        }));

        Assert.That(() => rig.Run(Body, source.Token), cancelled
            ? Throws.InstanceOf<OperationCanceledException>()
            : Throws.TypeOf<IOException>());
        Assert.That((isRead, left), Is.EqualTo((true, 3)), "Control: it was reading, and all left.");
        Assert.That(leftEarly, Is.Zero);

        void Body(Communicator communicator)
        {
            using DeviceTensor x = rig.Allocate(communicator.Rank, 6, 6);
            try
            {
                communicator.AllReduce(x);
            }
            finally
            {
                Interlocked.Increment(ref left);
            }
        }
    }

    [Test]
    public void Dispose_AfterSums_GivesTheirRoomBack()
    {
        IComputeBackend[] backends = [TestDevice.CreateRank(0), TestDevice.CreateRank(1)];
        using (var group = new InProcessGroup(backends))
        {
            group.Run(communicator =>
            {
                using DeviceTensor x = backends[communicator.Rank].Allocate(16, 64);
                communicator.AllReduce(x);
                communicator.AllReduce(x.Slice(0, 3));
            });
            Assert.That(backends.Select(b => b.AllocatedBytes), Is.All.EqualTo(backends[0].TensorBytes(1, 8 * 64)), "A share each.");
        }

        Assert.That(backends.Select(b => b.AllocatedBytes), Is.All.Zero);
        foreach (IComputeBackend backend in backends)
        {
            backend.Dispose();
        }
    }

    // A rectangle of a matrix of the owner, read into a matrix of the reader, against plain loops; both lie inside larger tensors.
    private static bool IsRead(IComputeBackend owner, IComputeBackend reader, int seed)
    {
        var random = new SeededRandom((ulong)seed);
        (int rows, int columns) = (random.Next(5), random.Next(5));
        bool accumulate = random.Next(2) == 0;
        using Sheet source = Draw(owner, ref random, out Rectangle from);
        using Sheet destination = Draw(reader, ref random, out Rectangle to);
        float[] expected = [.. destination.Values];
        for (int row = 0; row < rows; row++)
        {
            for (int column = 0; column < columns; column++)
            {
                float value = source.Values[(int)(from.Start + (row * from.Stride)) + source.First + column];
                int at = (int)(to.Start + (row * to.Stride)) + destination.First + column;
                expected[at] = accumulate ? expected[at] + value : value;
            }
        }

        reader.ReadPeer(source.Slice, from, destination.Slice, to, accumulate);
        return BitsOf(destination.Read()).SequenceEqual(BitsOf(expected)) &&
            BitsOf(source.Read()).SequenceEqual(BitsOf(source.Values));

        Sheet Draw(IComputeBackend backend, ref SeededRandom random, out Rectangle place)
        {
            (int above, int left) = (random.Next(3), random.Next(3));
            int width = Math.Max(1, columns + left + random.Next(3));
            place = new Rectangle((above * width) + left, rows, columns, width);
            var piece = Piece.Random(2 + above + rows + random.Next(2), width, ref random);
            return new Sheet(backend, piece);
        }
    }

    private static int[] BitsOf(float[] values) => Array.ConvertAll(values, BitConverter.SingleToInt32Bits);

    private delegate Piece Cut(Piece value, int rank, int ranks);

    /// <summary>A tensor and what was in it; its slice begins with the second row.</summary>
    private sealed class Sheet : IDisposable
    {
        private readonly IComputeBackend _backend;
        private readonly DeviceTensor _tensor;

        public Sheet(IComputeBackend backend, Piece piece)
        {
            (_backend, Values, First) = (backend, piece.Values, piece.Columns);
            _tensor = backend.Allocate(piece.Rows, piece.Columns);
            backend.Upload(Values, _tensor);
        }

        public float[] Values { get; }

        /// <summary>The first element of the slice.</summary>
        public int First { get; }

        public TensorSlice Slice => _tensor.Slice(1, _tensor.Rows - 1);

        public float[] Read()
        {
            float[] values = new float[Values.Length];
            _backend.Download(_tensor, values);
            return values;
        }

        public void Dispose() => _tensor.Dispose();
    }

    private sealed class Altered(IComputeBackend inner, string? kind = "altered", string? fault = null, Action? probe = null)
        : DelegatingBackend(inner)
    {
        public override string? PeerKind => kind;

        public override void ReadPeer(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate)
        {
            probe?.Invoke();
            (Rectangle read, Rectangle written) = (from, to);
            switch (fault)
            {
                case "adds what it should copy":
                    accumulate = true;
                    break;
                case "copies what it should add":
                    accumulate = false;
                    break;
                case "one place on" when to.End < (long)destination.Rows * destination.Columns:
                    written = written with { Start = to.Start + 1 };
                    break;
                case "without gaps":
                    read = read with { Stride = read.Columns };
                    break;
                case "a row less" when from.Rows > 0:
                    (read, written) = (read with { Rows = read.Rows - 1 }, written with { Rows = written.Rows - 1 });
                    break;
            }

            Inner.ReadPeer(source, read, destination, written, accumulate);
        }
    }
}
