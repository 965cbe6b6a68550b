using System.Diagnostics;
using System.Runtime.CompilerServices;
using FlexLLM.Backends;
using FlexLLM.Backends.Group;

namespace FlexLLM.Benchmarks;

/// <summary>Repeats what a probe does until it is worth a look at the clock, and keeps the spread of that.</summary>
internal static class RooflineMeasurement
{
    public const int RepeatDefault = 5;

    /// <summary>Seconds that one repetition lasts at least.</summary>
    private const double SecondsMin = 0.04;

    /// <summary>The device that a model is on.</summary>
    /// <param name="choice">What was asked for.</param>
    /// <param name="device">The same, opened; it gets a backend of its own, whose scratch memory nobody has limited.</param>
    /// <param name="threads">Threads of the managed backend.</param>
    public static Roofline Of(DeviceChoice choice, ComputeDevice device, int threads)
    {
        Console.Error.WriteLine("roofline: what the device does at best");
        ProbeSize size = ProbeSize.Of(choice);
        using IComputeBackend backend = device.CreateBackend();
        using DeviceProbe probe = Probe(choice, backend, size, threads);
        Roofline one = Best(Run(probe, size, RepeatDefault));

        if (backend is not GroupBackend group)
        {
            return one;
        }

        // Of several GPUs the first did it alone. Managed ranks multiplied each for itself, at the same time, and copied together.
        double copies = choice.IsCuda ? group.Ranks : 1;
        double products = choice.IsCuda || !choice.IsTorch ? group.Ranks : 1;
        return new Roofline(
            copies * one.CopyBytesPerSecond, products * one.F32FlopsPerSecond, products * one.BF16FlopsPerSecond);
    }

    /// <summary>What tells what the device does: libtorch where it is one of libtorch's, else the managed backend.</summary>
    public static DeviceProbe Probe(DeviceChoice device, IComputeBackend backend, ProbeSize size, int threads) =>
        device.IsTorch ? OfTorch(device, size) : new BackendProbe(backend, size, threads);

    /// <summary>Bytes a second, and operations a second by type of the weights.</summary>
    public static (Spread Copy, Spread F32, Spread BF16) Run(DeviceProbe probe, ProbeSize size, int repeat)
    {
        double flops = 2.0 * size.Rows * size.Side * size.Side;
        return (
            Rates(probe, probe.Copy, 2.0 * size.CopyBytes, repeat),
            Rates(probe, () => probe.Multiply(DType.F32), flops, repeat),
            Rates(probe, () => probe.Multiply(DType.BF16), flops, repeat));
    }

    /// <summary>The best of each: on a machine that does other things too, the others say less about the device.</summary>
    public static Roofline Best((Spread Copy, Spread F32, Spread BF16) rates) => new(rates.Copy.Max, rates.F32.Max, rates.BF16.Max);

    /// <summary>What the calls of a decode step cost on libtorch.</summary>
    /// <param name="backend">The device; it stays the caller's.</param>
    /// <param name="repeat">Repetitions.</param>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static RooflineCalls[] Calls(IComputeBackend backend, int repeat) =>
        [.. RooflineCalls.Measured.Select(m => RooflineCalls.Measure(backend, m.Rows, m.Adapters, repeat, () => TorchProbe.TensorsMade))];

    private static Spread Rates(DeviceProbe probe, Action run, double amount, int repeat)
    {
        Seconds(probe, run, 1);
        int calls = (int)Math.Clamp(Math.Ceiling(SecondsMin / Seconds(probe, run, 1)), 1, 1000);
        return Spread.Of(Enumerable.Range(0, repeat).Select(_ => calls * amount / Seconds(probe, run, calls)).ToArray());
    }

    // A method of its own: where there is no TorchSharp nothing may ask for the type.
    [MethodImpl(MethodImplOptions.NoInlining)]
    private static TorchProbe OfTorch(DeviceChoice device, ProbeSize size) => new(device, size);

    private static double Seconds(DeviceProbe probe, Action run, int calls)
    {
        probe.Wait();
        long start = Stopwatch.GetTimestamp();
        for (int i = 0; i < calls; i++)
        {
            run();
        }

        probe.Wait();
        return Stopwatch.GetElapsedTime(start).TotalSeconds;
    }
}
