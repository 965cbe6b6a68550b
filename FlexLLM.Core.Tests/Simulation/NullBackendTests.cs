using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Backends.Null;
using FlexLLM.Models;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>The machine that the simulations stand on: its clock, its times, its bytes.</summary>
[TestFixture]
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
