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

    [Test]
    public void Indices_Long_AreNotKept()
    {
        using var context = new TorchContext(new torch.Device(DeviceType.CPU), 1000);
        long before = torch.Tensor.TotalCount;
        for (int i = 0; i < 2; i++)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            context.Indices(new long[KeptIndices.LengthMax + 1]);
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
