using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Backends.Torch;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>The layers of a step share the index tensors that the first of them made.</summary>
[TorchFixture]
internal sealed class KeptIndicesTests
{
    private const int Layers = 24;
    private string _folder = null!;

    [OneTimeSetUp]
    public void MakeModel() => _folder = TinyCheckpoint.Write(Layers);

    [OneTimeTearDown]
    public void RemoveModel() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void Indices_SameNumbersAgain_AreCopiedOnce()
    {
        using var context = new TorchContext(new torch.Device(DeviceType.CPU), 1000, indicesKept: 2);
        long[][] asked = [[1, 2], [1, 2], [3], [1, 2], [4], [1, 2], [3], [1, 2, 3], [1, 2]];
        long[] uploads = [.. asked.Select(values =>
        {
            using DisposeScope scope = torch.NewDisposeScope();
            Span<byte> bytes = context.Indices(values).bytes;
            Assert.That(System.Runtime.InteropServices.MemoryMarshal.Cast<byte, long>(bytes).ToArray(), Is.EqualTo(values));
            return context.IndexUploads;
        })];
        Assert.That(uploads, Is.EqualTo(new long[] { 1, 1, 2, 2, 3, 3, 4, 5, 6 }), "Who was not asked for longest goes first.");
    }

    // The least recently used go: one fewer than a layer asks for in turn, and the next layer finds none of them.
    [TestCase(40, 4096, true)]
    [TestCase(1, 200_000, true)]
    [TestCase(8, 4096, false, Description = "control: limits of fewer sequences")]
    public void Indices_OfAllSequencesOfAStep_AreFoundByTheNextLayer(int segments, int positions, bool areFound)
    {
        using var context = new TorchContext(new torch.Device(DeviceType.CPU), 1000);
        context.Fit(TorchScratchTests.Limits with { Segments = segments, Positions = positions });
        int sequences = areFound ? segments : 40;
        long[] slots = new long[positions];
        for (int layer = 0; layer < 3; layer++)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            for (long sequence = 0; sequence < sequences; sequence++)
            {
                slots[0] = sequence;
                context.Indices(slots);
                context.Indices([sequence]);
            }
        }

        Assert.That(context.IndexUploads, Is.EqualTo(2 * sequences * (areFound ? 1 : 3)));
    }

    [Test]
    public void Indices_MoreBytesThanTheLimit_PushTheOldestOut()
    {
        using var context = new TorchContext(new torch.Device(DeviceType.CPU), 1000);
        long[] values = new long[KeptIndices.BytesDefault / sizeof(long) / 2];
        foreach ((int first, int uploads) in new[] { (1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4) })
        {
            using DisposeScope scope = torch.NewDisposeScope();
            values[0] = first;
            context.Indices(values);
            Assert.That(context.IndexUploads, Is.EqualTo(uploads));
        }
    }

    [Test]
    public void Indices_OfSequences_AreMadeAgainWhenABlockOrALengthChanges()
    {
        using var context = new TorchContext(new torch.Device(DeviceType.CPU), 1000);
        using var cache = new TorchKvCache(context, layers: 1, blocks: 9, kvHeads: 1, headDim: 2);
        int made = 0;
        SequenceIndices kind = Kind(-1);
        SequenceIndices other = Kind(-2);
        int[] blocks = [3, 8, 2];
        AttentionSegment long1 = new(0, 1, 20, cache, blocks);
        AttentionSegment short1 = new(1, 1, 4, cache, [7]);
        (SequenceIndices Kind, AttentionSegment[] Sequences, int End, bool IsNew)[] asked =
        [
            (kind, [long1, short1], 21, true), (kind, [long1, short1], 21, false), (other, [long1, short1], 21, true),
            (kind, [short1, long1], 21, true), (kind, [long1], 21, true), (kind, [long1 with { PositionStart = 21 }], 22, true),
            (kind, [long1 with { BlockTable = [3, 1, 2] }], 21, true), (kind, [long1 with { BlockTable = [3, 8, 4] }], 21, false),
            (kind, [long1, short1 with { PositionStart = 5 }], 21, true), (kind, [long1, short1], 21, false),
        ];
        foreach ((SequenceIndices asking, AttentionSegment[] sequences, int end, bool isNew) in asked)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            int before = made;
            Span<byte> bytes = context.Indices(asking, sequences, end).bytes;
            Assert.That(made - before, Is.EqualTo(isNew ? sequences.Length : 0));
            long[] values = System.Runtime.InteropServices.MemoryMarshal.Cast<byte, long>(bytes).ToArray();
            IEnumerable<long> expected = sequences.SelectMany(s => Enumerable.Range(0, end).Select(i => Number(s, i, s.PositionStart + 1)));
            Assert.That(values, Is.EqualTo(expected));
        }

        SequenceIndices Kind(int marker) => new(marker, (in AttentionSegment segment, int length, Span<long> values) =>
        {
            made++;
            for (int i = 0; i < values.Length; i++)
            {
                values[i] = Number(segment, i, length);
            }
        });

        static long Number(in AttentionSegment segment, int i, int length) =>
            i < length ? (100 * segment.BlockTable[i / DeviceKvCache.TokensPerBlock]) + i : -i;
    }

    [Test]
    public void Indices_Long_AreNotKept()
    {
        using var context = new TorchContext(new torch.Device(DeviceType.CPU), 1000);
        long before = torch.Tensor.TotalCount;
        for (int i = 0; i < 2; i++)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            context.Indices(new long[(KeptIndices.BytesDefault / sizeof(long)) + 1]);
        }

        Assert.That((context.IndexUploads, torch.Tensor.TotalCount), Is.EqualTo((2L, before)));
    }

    // Both engines run in turns. Counts are checked; times are told but decide nothing: the engine that was loaded first is the slower,
    // whichever it is.
    [Test]
    public async Task CompleteAsync_ManyLayers_UploadsPerStepDoNotGrowWithThem()
    {
        var kept = new CountedDevice(KeptIndices.CountDefault);
        var none = new CountedDevice(0);
        await using CoServingEngine withKept = await LoadAsync(kept);
        await using CoServingEngine without = await LoadAsync(none);
        (double Uploads, double Milliseconds)[] first = new (double, double)[7];
        (double Uploads, double Milliseconds)[] second = new (double, double)[7];
        for (int turn = 0; turn < first.Length; turn++)
        {
            // Who goes first changes from turn to turn.
            if (turn % 2 == 0)
            {
                first[turn] = await PerStepAsync(withKept, kept);
            }

            second[turn] = await PerStepAsync(without, none);
            if (turn % 2 != 0)
            {
                first[turn] = await PerStepAsync(withKept, kept);
            }
        }

        (double Uploads, double Milliseconds) a = Median(first);
        (double Uploads, double Milliseconds) b = Median(second);
        await TestContext.Out.WriteLineAsync(FormattableString.Invariant(
            $"kept: {a.Uploads:F1} uploads and {a.Milliseconds:F2} ms a step; none kept: {b.Uploads:F1} and {b.Milliseconds:F2} ms"));
        Assert.That(b.Uploads, Is.GreaterThan(4 * Layers), "Control: each layer asks for its own.");
        Assert.That(a.Uploads, Is.LessThan(8));
    }

    private static (double Uploads, double Milliseconds) Median((double Uploads, double Milliseconds)[] turns) => (
        turns.Select(turn => turn.Uploads).Order().ElementAt(turns.Length / 2),
        turns.Select(turn => turn.Milliseconds).Order().ElementAt(turns.Length / 2));

    private static async Task<(double Uploads, double Milliseconds)> PerStepAsync(CoServingEngine engine, CountedDevice device)
    {
        long steps = (await engine.GetStatisticsAsync()).Steps;
        long uploads = device.Backend!.IndexUploads;
        long begun = Stopwatch.GetTimestamp();
        await Task.WhenAll(Enumerable.Range(1, 4).Select(i => engine.CompleteAsync(
            new GenerationRequest([.. Enumerable.Range(1, 5 * i)]) { MaxTokens = 60, IgnoreEos = true })));
        double milliseconds = Stopwatch.GetElapsedTime(begun).TotalMilliseconds;
        steps = (await engine.GetStatisticsAsync()).Steps - steps;
        return ((double)(device.Backend.IndexUploads - uploads) / steps, milliseconds / steps);
    }

    private Task<CoServingEngine> LoadAsync(ComputeDevice device) => CoServingEngine.LoadAsync(
        _folder, new CoServingOptions { Device = device, ProfilingTimeMax = TimeSpan.Zero, PrefixCaching = false });

    private sealed class CountedDevice(int indicesKept) : ComputeDevice
    {
        public TorchComputeBackend? Backend { get; private set; }

        internal override IComputeBackend CreateBackend() =>
            Backend = new TorchComputeBackend(new torch.Device(DeviceType.CPU), indicesKept: indicesKept);
    }
}
