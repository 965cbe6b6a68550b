using FlexLLM.Backends;
using FlexLLM.Primitives;
using FlexLLM.Tests.Contracts;
using FlexLLM.Tests.Support;
using FsCheck;
using FsCheck.Fluent;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends.Group;

/// <summary>Each collective against its plain definition, bit for bit, from memory to memory and through the host.</summary>
[DeviceFixture(true)]
[DeviceFixture(false)]
internal sealed class CollectiveTests(bool isDirect)
{
    private static readonly int[] RowCounts = [0, 1, 2, 3, 7, 33];

    private GroupRig _rig = null!;

    [TearDown]
    public void Close() => _rig.Dispose();

    [Test]
    public void AllReduce_AnyRanks_IsTheSumInRankOrder([Range(1, 4)] int ranks, [ValueSource(nameof(RowCounts))] int rows)
    {
        Piece[] partials = Partials(ranks, rows, 12);
        Expect(_rig.AllReduce(partials), _ => Piece.Sum(partials));
    }

    [Test]
    public void AllGather_AnyRanks_PutsThePartsTogether([Range(1, 4)] int ranks, [ValueSource(nameof(RowCounts))] int rows)
    {
        Piece whole = Partials(ranks, rows, 12)[0];
        Expect(Run((c, from, to) => c.AllGatherRows(from, to), whole.RowsOf, _ => whole), _ => whole);
        Expect(Run((c, from, to) => c.AllGatherColumns(from, to), whole.ColumnsOf, _ => whole), _ => whole);
    }

    [Test]
    public void ReduceScatter_AnyRanks_GivesEachItsPartOfTheSum([Range(1, 4)] int ranks, [ValueSource(nameof(RowCounts))] int rows)
    {
        Piece[] partials = Partials(ranks, rows, 12);
        Piece sum = Piece.Sum(partials);
        ExpectParts((c, from, to) => c.ReduceScatterRows(from, to), (rank, _) => partials[rank], sum.RowsOf);
        ExpectParts((c, from, to) => c.ReduceScatterColumns(from, to), (rank, _) => partials[rank], sum.ColumnsOf);
    }

    [Test]
    public void AllToAll_AnyRanks_CutsTheOtherWay([Range(1, 4)] int ranks, [ValueSource(nameof(RowCounts))] int rows)
    {
        Piece whole = Partials(ranks, rows, 12)[0];
        ExpectParts((c, from, to) => c.AllToAllRowsToColumns(from, to), whole.RowsOf, whole.ColumnsOf);
        ExpectParts((c, from, to) => c.AllToAllColumnsToRows(from, to), whole.ColumnsOf, whole.RowsOf);
    }

    [Test]
    public void AllReduce_Repeated_HasTheSameBitsOnEveryRankEachTime()
    {
        Piece[] partials = Partials(4, 33, 20);
        int[] first = _rig.AllReduce(partials)[0].Bits;
        for (int i = 0; i < 50; i++)
        {
            Assert.That(_rig.AllReduce(partials).Select(result => result.Bits), Is.All.EqualTo(first));
        }

        Assert.That(Piece.Sum(partials.Reverse()).Bits, Is.Not.EqualTo(first), "Control: another order has other bits.");
    }

    [Test]
    public void Calls_BackToBack_DoNotDisturbEachOther([Values] bool oneIsSlow)
    {
        const int Calls = 500;
        const int Rows = 6;
        _rig = new GroupRig(3, isDirect, (rank, inner) => oneIsSlow && rank == 1 ? new Hesitant(inner) : inner);
        int wrong = 0;
        _rig.Run(communicator =>
        {
            int rank = communicator.Rank;
            using DeviceTensor x = _rig.Allocate(rank, Rows, 3);
            using DeviceTensor part = _rig.Allocate(rank, Rows, 1);
            float[] values = new float[Rows * 3];
            for (int call = 0; call < Calls; call++)
            {
                // Every call has its own values and size; the last one to look finds them overwritten if anybody runs ahead.
                int rows = 1 + (call % Rows);
                Span<float> sized = values.AsSpan(0, rows * 3);
                sized.Fill((call * 3) + rank);
                _rig.Upload(rank, sized, x.Slice(0, rows));
                if (call % 2 == 0)
                {
                    communicator.AllReduce(x.Slice(0, rows));
                }
                else
                {
                    communicator.ReduceScatterColumns(x.Slice(0, rows), part.Slice(0, rows));
                    communicator.AllGatherColumns(part.Slice(0, rows), x.Slice(0, rows));
                }

                _rig.Download(rank, x.Slice(0, rows), sized);
                wrong += sized.ContainsAnyExcept((call * 9) + 3) ? 1 : 0;
            }
        });
        Assert.That(wrong, Is.Zero);
    }

    [Test]
    public void AllReduce_AnyInput_EqualsReduceScatterThenAllGather()
    {
        Assert.That(() => Check(isControl: false), Throws.Nothing);
        Assert.That(() => Check(isControl: true), Throws.Exception, "Control: sums in descending order must be told apart.");

        void Check(bool isControl)
        {
            Gen<(int Ranks, int Rows, int Width, int Seed)> inputs =
                from ranks in Gen.Choose(1, 4)
                from rows in Gen.Choose(0, 9)
                from width in Gen.Choose(1, 5)
                from seed in Gen.Choose(0, int.MaxValue - 1)
                select (ranks, rows, width, seed);
            Config config = Repeatable.Many(seed: 11, count: 60);
            FsCheck.Check.One(config, Prop.ForAll(inputs.ToArbitrary(), input => Agree(input, isControl)));
        }
    }

    private bool Agree((int Ranks, int Rows, int Width, int Seed) input, bool isControl)
    {
        using GroupRig rig = _rig = new GroupRig(input.Ranks, isDirect);
        var random = new SeededRandom((ulong)input.Seed);
        Piece[] partials = [.. Enumerable.Range(0, input.Ranks)
            .Select(_ => Piece.Random(input.Rows, input.Width * input.Ranks, ref random))];
        Piece[] reduced = isControl
            ? [.. partials.Select(_ => Piece.Sum(partials.Reverse()))]
            : rig.AllReduce(partials);
        Piece[] byRows = Run((c, from, to) => c.ReduceScatterRows(from, to), (r, _) => partials[r], reduced[0].RowsOf);
        Piece[] byColumns = Run((c, from, to) => c.ReduceScatterColumns(from, to), (r, _) => partials[r], reduced[0].ColumnsOf);
        byRows = Run((c, from, to) => c.AllGatherRows(from, to), (r, _) => byRows[r], _ => reduced[0]);
        byColumns = Run((c, from, to) => c.AllGatherColumns(from, to), (r, _) => byColumns[r], _ => reduced[0]);
        return Enumerable.Range(0, input.Ranks).All(rank =>
            byRows[rank].Bits.SequenceEqual(reduced[rank].Bits) && byColumns[rank].Bits.SequenceEqual(reduced[rank].Bits));
    }

    private Piece[] Partials(int ranks, int rows, int columns)
    {
        _rig = new GroupRig(ranks, isDirect);
        var random = new SeededRandom((ulong)((rows * 10) + ranks));
        return [.. Enumerable.Range(0, ranks).Select(_ => Piece.Random(rows, columns, ref random))];
    }

    private Piece[] Run(CollectiveCall call, Func<int, int, Piece> brought, Func<int, int, Piece> takenLike)
    {
        int ranks = _rig.Group.Ranks;
        return _rig.Run(
            call,
            [.. Enumerable.Range(0, ranks).Select(rank => brought(rank, ranks))],
            rank => (takenLike(rank, ranks).Rows, takenLike(rank, ranks).Columns));
    }

    private Piece[] Run(CollectiveCall call, Func<int, int, Piece> brought, Func<int, Piece> takenLike) =>
        Run(call, brought, (rank, _) => takenLike(rank));

    private void ExpectParts(CollectiveCall call, Func<int, int, Piece> brought, Func<int, int, Piece> expected) =>
        Expect(Run(call, brought, expected), rank => expected(rank, _rig.Group.Ranks));

    private static void Expect(Piece[] results, Func<int, Piece> expected)
    {
        for (int rank = 0; rank < results.Length; rank++)
        {
            Assert.That(results[rank].Bits, Is.EqualTo(expected(rank).Bits), $"rank {rank}");
        }
    }

    /// <summary>Lets the others run ahead, if they can, before it reads or takes anything.</summary>
    private sealed class Hesitant(IComputeBackend inner) : DelegatingBackend(inner)
    {
        private int _calls;

        public override void ReadPeer(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate)
        {
            Hesitate();
            Inner.ReadPeer(source, from, destination, to, accumulate);
        }

        public override void Upload(ReadOnlySpan<float> source, TensorSlice destination)
        {
            Hesitate();
            Inner.Upload(source, destination);
        }

        private void Hesitate()
        {
            if (_calls++ % 16 == 0)
            {
                SpinWait.SpinUntil(() => false, 1);
            }
        }
    }
}
