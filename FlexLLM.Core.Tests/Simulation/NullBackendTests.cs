using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Backends.Null;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>The machine that the simulations stand on: its clock, its times, its bytes.</summary>
[TestFixture]
[Parallelizable]
internal sealed class NullBackendTests
{
    private const int Rows = 8;
    private const int In = 512;
    private const int Out = 1024;

    private static readonly NullMachine Machine = new() { FlopsPerSecond = 1e12, BytesPerSecond = 1e9, SecondsPerCall = 1e-3 };

    private ManualClock _clock = null!;
    private NullBackend _backend = null!;

    [SetUp]
    public void SetUp()
    {
        _clock = new ManualClock();
        _backend = new NullBackend(Machine, _clock, seed: 1);
    }

    [TearDown]
    public void TearDown() => _backend.Dispose();

    [Test]
    public void Clock_MovesByAdvanceAlone()
    {
        long begun = _clock.GetTimestamp();
        Assert.That(_clock.GetElapsedTime(begun), Is.EqualTo(TimeSpan.Zero));

        _clock.Advance(TimeSpan.FromSeconds(2));

        Assert.That(_clock.GetElapsedTime(begun), Is.EqualTo(TimeSpan.FromSeconds(2)));
        Assert.That(_clock.GetUtcNow(), Is.EqualTo(DateTimeOffset.UnixEpoch.AddSeconds(2)));
        Assert.That(() => _clock.Advance(TimeSpan.FromTicks(-1)), Throws.TypeOf<UnreachableException>());
    }

    [Test]
    public void Linear_FewRows_TakesTheWeightsBytes()
    {
        double seconds = SecondsOf(Machine, Rows);

        double bytes = 4.0 * ((In * Out) + (Rows * In) + (Rows * Out));
        Assert.That(seconds, Is.EqualTo(1e-3 + (bytes / 1e9)).Within(1e-6));
    }

    [Test]
    public void Linear_ManyRows_TakesTheArithmetic()
    {
        double seconds = SecondsOf(Machine with { FlopsPerSecond = 1e8 }, Rows);

        Assert.That(seconds, Is.EqualTo(1e-3 + (2.0 * Rows * In * Out / 1e8)).Within(1e-6));
    }

    [Test]
    public void Linear_NoRows_TakesNoTime() => Assert.That(SecondsOf(Machine, 0), Is.Zero);

    [Test]
    public void Linear_ManyCalls_LosesNoFractionOfATick()
    {
        var fast = new NullMachine { FlopsPerSecond = 1e18, BytesPerSecond = 1e18, SecondsPerCall = 1.25e-8 };
        using var backend = new NullBackend(fast, _clock, seed: 1);
        using DeviceTensor x = backend.Allocate(1, 1);
        long begun = _clock.GetTimestamp();
        for (int i = 0; i < 8_000; i++)
        {
            backend.Zero(x);
        }

        Assert.That(_clock.GetElapsedTime(begun).TotalMilliseconds, Is.EqualTo(0.1).Within(0.001));
    }

    [Test]
    public void Slowdown_MultipliesTime()
    {
        _backend.Slowdown = 3.0;
        double slow = SecondsOf(_backend, Rows);
        _backend.Slowdown = 1.0;

        Assert.That(slow, Is.EqualTo(3.0 * SecondsOf(_backend, Rows)).Within(1e-6));
    }

    [Test]
    public void Jitter_SameSeed_SameTimes()
    {
        NullMachine noisy = Machine with { Jitter = 0.1, JitterPeriod = TimeSpan.FromMilliseconds(1) };
        double[] first = Times(seed: 7);

        Assert.That(Times(seed: 7), Is.EqualTo(first));
        Assert.That(Times(seed: 8), Is.Not.EqualTo(first));
        double deviation = Math.Sqrt(first.Average(t => Math.Pow(Math.Log(t / SecondsOf(Machine, Rows)), 2)));
        Assert.That(deviation, Is.InRange(0.05, 0.15));

        double[] Times(ulong seed)
        {
            using var backend = new NullBackend(noisy, _clock, seed);
            return [.. Enumerable.Range(0, 100).Select(_ => SecondsOf(backend, Rows))];
        }
    }

    [Test]
    public void Attention_LongerContext_TakesLonger()
    {
        double near = AttentionSeconds(positionStart: 0);

        Assert.That(AttentionSeconds(positionStart: 4000), Is.GreaterThan(near + (4000.0 * 2 * 2 * 16 * 4 / 1e9) - 1e-6));
    }

    [Test]
    public void Memory_EverythingDisposed_IsZero()
    {
        LoadedModel model = LoadedModel.CreateEmpty(ModelShapes.Of("tiny"), _backend, DType.BF16, positionsMax: 128);
        Assert.That(_backend.AllocatedBytes, Is.EqualTo(model.WeightBytes).And.GreaterThan(0));

        DeviceFactor factor = _backend.CreateFactor(4, In);
        Assert.That(_backend.AllocatedBytes, Is.EqualTo(model.WeightBytes + (4 * 4 * In)));

        factor.Dispose();
        factor.Dispose();
        model.Dispose();
        Assert.That(_backend.AllocatedBytes, Is.Zero);
    }

    [Test]
    public void Operations_WrongShapeOrDisposed_BreakAnInvariant()
    {
        using DeviceWeight weight = Weight(_backend);
        using DeviceTensor x = _backend.Allocate(Rows, In);
        using DeviceTensor y = _backend.Allocate(Rows, Out + 1);
        DeviceTensor gone = _backend.Allocate(Rows, Out);
        gone.Dispose();

        Assert.That(() => _backend.Linear(x, weight, null, y, accumulate: false), Throws.TypeOf<UnreachableException>());
        Assert.That(() => _backend.Linear(x, weight, null, gone, accumulate: false), Throws.TypeOf<UnreachableException>());
        Assert.That(() => _backend.Add(x, x, y), Throws.TypeOf<UnreachableException>());
    }

    [TestCaseSource(typeof(ShapeChecks), nameof(ShapeChecks.Names))]
    public void WrongShape_IsABrokenInvariant(string mistake) => ShapeChecks.Throws(_backend, mistake);

    // Bytes and operations of one call on 8 rows of 512 columns, 16 of them inside the bypass.
    [TestCase("Narrow", 4 * ((Rows * In) + (16 * In) + (Rows * 16)), 2 * Rows * In * 16)]
    [TestCase("Widen", 4 * ((Rows * 16) + (16 * In) + (2 * Rows * In)), 2 * Rows * In * 16)]
    [TestCase("AddOuter", 4 * ((Rows * 16) + (Rows * In) + (2 * 16 * In)), 2 * Rows * In * 16)]
    [TestCase("AddBias", 4 * ((2 * Rows * In) + In), Rows * In)]
    [TestCase("AddColumnSums", 4 * ((Rows * In) + (2 * In)), Rows * In)]
    [TestCase("ScaleColumns", 4 * ((3 * Rows * In) + In), 2 * Rows * In)]
    [TestCase("ScaleColumnsBackward", 4 * ((3 * Rows * In) + (3 * In)), 4 * Rows * In)]
    [TestCase("CopyColumns", 4 * 2 * Rows * 100, 0)]
    [TestCase("ReluBackward", 4 * 3 * Rows * In, Rows * In)]
    [TestCase("Pack", (4 * Rows * In) + (2 * Rows * In), Rows * In)]
    public void BypassOperation_TakesItsBytesOrItsArithmetic(string operation, int bytes, int flops)
    {
        Assert.That(Seconds(Machine), Is.EqualTo(1e-3 + (bytes / 1e9)).Within(1e-6), "memory");
        Assert.That(
            Seconds(Machine with { BytesPerSecond = 1e18, FlopsPerSecond = 1e9 }), Is.EqualTo(1e-3 + (flops / 1e9)).Within(1e-6),
            "arithmetic");

        double Seconds(NullMachine machine)
        {
            using var backend = new NullBackend(machine, _clock, seed: 1);
            using DeviceFactor m = backend.CreateFactor(16, In);
            using DeviceTensor x = backend.Allocate(Rows, In);
            using DeviceTensor u = backend.Allocate(Rows, 16);
            using DeviceTensor row = backend.Allocate(1, In);
            using DeviceTensor packed = backend.Allocate(Rows, In / 2);
            long begun = _clock.GetTimestamp();
            switch (operation)
            {
                case "Narrow":
                    backend.Narrow(x, m, 1f, u, accumulate: false);
                    break;
                case "Widen":
                    backend.Widen(u, m, 1f, x, accumulate: true);
                    break;
                case "AddOuter":
                    backend.AddOuter(u, x, 1f, m.Values);
                    break;
                case "AddBias":
                    backend.AddBias(x, row);
                    break;
                case "AddColumnSums":
                    backend.AddColumnSums(x, row);
                    break;
                case "ScaleColumns":
                    backend.ScaleColumns(x, row, x, accumulate: true);
                    break;
                case "ScaleColumnsBackward":
                    backend.ScaleColumnsBackward(x, x, row, row, x, accumulate: false);
                    break;
                case "CopyColumns":
                    backend.CopyColumns(x, 0, x, 200, 100);
                    break;
                case "ReluBackward":
                    backend.ReluBackward(x, x, x);
                    break;
                default:
                    backend.Pack(x, PackedFormat.BF16, packed);
                    break;
            }

            return _clock.GetElapsedTime(begun).TotalSeconds;
        }
    }

    [Test]
    public void Download_GivesOneTokenThatTheSeedChooses()
    {
        float[] a = Row(_backend);
        using var again = new NullBackend(Machine, _clock, seed: 1);

        Assert.That(a.Count(v => v == 1f) == 1 && a.Count(v => v == 0f) == In - 1, "one among zeros");
        Assert.That(Row(again), Is.EqualTo(a));
        Assert.That(Row(again), Is.Not.EqualTo(a), "the next one");

        static float[] Row(NullBackend backend)
        {
            using DeviceTensor logits = backend.Allocate(1, In);
            float[] row = new float[In];
            backend.Download(logits, row);
            return row;
        }
    }

    private double SecondsOf(NullMachine machine, int rows)
    {
        using var backend = new NullBackend(machine, _clock, seed: 1);
        return SecondsOf(backend, rows);
    }

    private double SecondsOf(NullBackend backend, int rows)
    {
        using DeviceWeight weight = Weight(backend);
        using DeviceTensor x = backend.Allocate(rows, In);
        using DeviceTensor y = backend.Allocate(rows, Out);
        long begun = _clock.GetTimestamp();
        backend.Linear(x, weight, null, y, accumulate: false);
        return _clock.GetElapsedTime(begun).TotalSeconds;
    }

    private double AttentionSeconds(int positionStart)
    {
        using DeviceTensor q = _backend.Allocate(1, 64);
        using DeviceTensor o = _backend.Allocate(1, 64);
        using DeviceKvCache cache = _backend.CreateKvCache(1, 300, 2, 16);
        var segment = new AttentionSegment(0, 1, positionStart, cache, [.. Enumerable.Range(0, 300)]);
        long begun = _clock.GetTimestamp();
        _backend.Attention(q, o, 0, [segment]);
        return _clock.GetElapsedTime(begun).TotalSeconds;
    }

    private static unsafe DeviceWeight Weight(NullBackend backend) =>
        backend.CreateWeight(new HostMatrix(null, DType.F32, Out, In), DType.F32);
}
