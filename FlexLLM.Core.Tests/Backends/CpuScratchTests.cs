using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Primitives;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends;

/// <summary>Scratch memory that was reserved: exactly what was told, enough for every call within the limits, and for no other.</summary>
[TestFixture]
internal sealed class CpuScratchTests
{
    [Test]
    public void Calls_WithinLimits_GrowNothing([Range(1, 12)] int seed, [Values(1, 3)] int threads)
    {
        var random = new SeededRandom((ulong)seed);
        ScratchLimits limits = Draw(ref random);
        using CpuBackend backend = new(threads);
        backend.ReserveScratch(limits);
        Assert.That(backend.AllocatedBytes, Is.EqualTo(backend.ScratchBytes(limits)));
        using var calls = new Calls(backend, limits);
        for (int round = 0; round < 4; round++)
        {
            // The first round is the largest there is, the others are any.
            calls.Run(limits, ref random, largest: round == 0);
        }

        Assert.That(backend.AllocatedBytes - calls.Bytes, Is.EqualTo(backend.ScratchBytes(limits)));
    }

    [Test]
    public void ReserveScratch_Again_ShrinksAndGrows()
    {
        var random = new SeededRandom(5);
        ScratchLimits large = Draw(ref random) with { Trains = true };
        ScratchLimits small = large with { Rows = 1, SampledRows = 1, Segments = 1, Trains = false };
        using CpuBackend backend = new(2);
        foreach (ScratchLimits limits in (ScratchLimits[])[large, small, large with { Trains = false }, large, large])
        {
            backend.ReserveScratch(limits);
            Assert.That(backend.AllocatedBytes, Is.EqualTo(backend.ScratchBytes(limits)));
        }

        Assert.That(backend.ScratchBytes(small), Is.LessThan(backend.ScratchBytes(large)));
    }

    [Test]
    public void Calls_BeyondLimits_AreABrokenInvariant()
    {
        var random = new SeededRandom(3);
        ScratchLimits limits = Draw(ref random) with { Rows = 70, Vocabulary = 4000, Trains = true };
        using CpuBackend backend = new(1);
        using var calls = new Calls(backend, limits);
        backend.ReserveScratch(limits);
        calls.Run(limits, ref random, largest: true);
        foreach (ScratchLimits less in (ScratchLimits[])[
            limits with { Rows = 40 }, limits with { Trains = false }, limits with { Positions = limits.Positions / 8 },
            limits with { Vocabulary = 500 }])
        {
            backend.ReserveScratch(less);
            Assert.That(() => calls.Run(limits, ref random, largest: true), Throws.TypeOf<UnreachableException>(), less.ToString());
        }
    }

    private static ScratchLimits Draw(ref SeededRandom random)
    {
        int rows = random.Next(1, 200);
        int kvHeads = random.Next(1, 4);
        int positions = random.Next(rows, 400);
        return new ScratchLimits
        {
            Rows = rows,
            Segments = random.Next(1, Math.Min(rows, 20) + 1),
            Positions = positions,
            SampledRows = random.Next(1, rows + 1),
            HiddenColumns = random.Next(1, 80),
            Vocabulary = random.Next(2, 3000),
            InputColumnsMax = random.Next(100, 1500),
            KvHeads = kvHeads,
            QueryHeads = kvHeads * random.Next(1, 8),
            HeadDim = 2 * random.Next(1, 20),
            RankMax = random.Next(1, 40),
            InnerMax = random.Next(40, 90),
            Trains = random.Next(3) > 0,
        };
    }

    /// <summary>Every operation that takes scratch memory, on operands of the largest shapes.</summary>
    private sealed class Calls : IDisposable
    {
        private readonly CpuBackend _backend;
        private readonly Workbench _bench;
        private readonly DeviceTensor _wide;
        private readonly DeviceTensor _hidden;
        private readonly DeviceTensor _query;
        private readonly DeviceTensor _key;
        private readonly DeviceTensor _logits;
        private readonly DeviceTensor _logSumExp;
        private readonly DeviceWeight _weight;
        private readonly DeviceWeight _head;
        private readonly DeviceFactor _a;
        private readonly DeviceFactor _b;
        private readonly DeviceFactor _narrow;
        private readonly DeviceFactor _widen;
        private readonly DeviceKvCache _cache;
        private readonly int[] _table;

        public Calls(CpuBackend backend, ScratchLimits limits)
        {
            _backend = backend;
            _bench = new Workbench(backend);
            long before = backend.AllocatedBytes;
            int positions = limits.Positions;
            int blocks = (positions + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock;
            _wide = Tensor(limits.Rows, limits.InputColumnsMax);
            _hidden = Tensor(limits.Rows, limits.HiddenColumns);
            _query = Tensor(positions, limits.QueryHeads * limits.HeadDim);
            _key = Tensor(positions, limits.KvHeads * limits.HeadDim);
            _logits = Tensor(limits.SampledRows, limits.Vocabulary);
            _logSumExp = Tensor(positions, limits.QueryHeads);
            _weight = _bench.RandomWeight(limits.HiddenColumns, limits.InputColumnsMax, DType.BF16).Weight;
            _head = _bench.RandomWeight(limits.Vocabulary, limits.HiddenColumns, DType.F32).Weight;
            _a = _bench.Own(backend.CreateFactor(limits.RankMax, limits.InputColumnsMax));
            _b = _bench.Own(backend.CreateFactor(limits.RankMax, limits.HiddenColumns));
            _narrow = _bench.Own(backend.CreateFactor(limits.InnerMax, limits.InputColumnsMax));
            _widen = _bench.Own(backend.CreateFactor(limits.InnerMax, limits.HiddenColumns));
            _cache = _bench.Own(backend.CreateKvCache(1, blocks + 20, limits.KvHeads, limits.HeadDim));

            // Longer than any sequence: what is behind its positions costs nothing.
            _table = [.. Enumerable.Range(0, blocks + 20)];
            Bytes = backend.AllocatedBytes - before;
        }

        public long Bytes { get; }

        public void Run(in ScratchLimits limits, ref SeededRandom random, bool largest)
        {
            int rows = Size(limits.Rows, ref random);
            int[] cuts = [0, .. Cuts(rows, Size(limits.Segments, ref random), ref random), rows];
            var attention = new AttentionSegment[cuts.Length - 1];
            var bypasses = new LoraSegment[cuts.Length - 1];
            for (int i = 0; i < attention.Length; i++)
            {
                int count = cuts[i + 1] - cuts[i];
                int start = largest ? limits.Positions - count : random.Next(limits.Positions - count + 1);
                attention[i] = new AttentionSegment(cuts[i], count, start, _cache, _table);
                bypasses[i] = new LoraSegment(cuts[i], count, _a, _b, 1f);
            }

            TensorSlice q = _query.Slice(0, rows);
            _backend.AppendKv(_key.Slice(0, rows), _key.Slice(0, rows), 0, attention);
            _backend.Attention(q, q, 0, attention);
            _backend.LoraBypass(_wide.Slice(0, rows), bypasses, _hidden.Slice(0, rows));
            using DeviceTensor u = _backend.Allocate(rows, _narrow.Inner);
            _backend.Narrow(_wide.Slice(0, rows), _narrow, 2f, u, accumulate: false);
            _backend.Widen(u, _widen, 2f, _hidden.Slice(0, rows), accumulate: false);
            int[] sampled = [.. Enumerable.Range(0, Math.Min(rows, Size(limits.SampledRows, ref random)))];
            _backend.Logits(_hidden, sampled, _head, _logits.Slice(0, sampled.Length));
            if (!limits.Trains)
            {
                return;
            }

            TensorSlice hidden = _hidden.Slice(0, rows);
            using DeviceTensor gradA = _backend.Allocate(_a.Inner, _a.Wide);
            using DeviceTensor gradB = _backend.Allocate(_b.Inner, _b.Wide);
            using DeviceTensor gradient = _backend.Allocate(_widen.Inner, _widen.Wide);
            _backend.AddOuter(u, hidden, 2f, gradient);
            _backend.LinearBackwardInput(hidden, _weight, _wide.Slice(0, rows), accumulate: false);
            _backend.LoraBypassBackward(_wide.Slice(0, rows), hidden, _a, _b, 1f, gradA, gradB, null);
            AttentionSegment window = new(0, rows, limits.Positions - rows, _cache, _table, _logSumExp);
            _backend.AttentionBackward(q, q, 0, window, q, _key, _key);
            int vocabulary = limits.Vocabulary;
            int[] targets = [.. Enumerable.Range(0, rows).Select(i => i % vocabulary)];
            using DeviceTensor losses = _backend.Allocate(rows, 1);
            _backend.FusedLinearCrossEntropy(hidden, targets, _head, 1f, hidden, losses);

            int Size(int max, ref SeededRandom chance) => largest ? max : chance.Next(1, max + 1);
        }

        public void Dispose() => _bench.Dispose();

        // One row each, and the rest: the most pieces that there can be; else anywhere.
        private static int[] Cuts(int rows, int segments, ref SeededRandom random)
        {
            var cuts = new SortedSet<int>();
            while (cuts.Count < Math.Min(segments, rows) - 1)
            {
                cuts.Add(rows < 3 * segments ? cuts.Count + 1 : random.Next(1, rows));
            }

            return [.. cuts];
        }

        private DeviceTensor Tensor(int rows, int columns) => _bench.Own(_backend.Allocate(rows, columns));
    }
}
