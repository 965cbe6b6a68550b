using System.Runtime.InteropServices;
using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>Copies and products of a device, for <see cref="RooflineMeasurement"/>.</summary>
internal abstract class DeviceProbe : IDisposable
{
    /// <summary>Copies the bytes that were asked for when this was made.</summary>
    public abstract void Copy();

    /// <summary>Multiplies x [rows, side] with weights [side, side].</summary>
    public abstract void Multiply(DType weights);

    /// <summary>Returns when all that was started is done.</summary>
    public abstract void Wait();

    public abstract void Dispose();
}

/// <summary>How much a probe moves and multiplies at once.</summary>
internal readonly record struct ProbeSize(long CopyBytes, int Rows, int Side)
{
    /// <summary>Large enough for nothing to stay in a cache, small enough to take a second.</summary>
    public static ProbeSize Of(DeviceChoice device) =>
        device.IsCuda ? new ProbeSize(1L << 30, 8192, 8192) : new ProbeSize(256L << 20, 512, 2048);
}

/// <summary>
/// Products through the waist, as the engine calls it; copies by as many threads as compute, since the managed backend's own use one.
/// </summary>
internal sealed unsafe class BackendProbe : DeviceProbe
{
    private readonly IComputeBackend _backend;
    private readonly DeviceTensor _x;
    private readonly DeviceTensor _y;
    private readonly DeviceTensor[] _copy = [];
    private readonly Dictionary<DType, DeviceWeight> _weights = [];
    private readonly long _bytes;
    private readonly int _threads;
    private readonly float[] _one = new float[1];
    private readonly DeviceTensor _end;
    private byte* _from;
    private byte* _to;

    /// <param name="backend">The device; it stays the caller's.</param>
    /// <param name="size">How much.</param>
    /// <param name="threads">Threads that copy host memory; null copies tensors of the device.</param>
    public BackendProbe(IComputeBackend backend, ProbeSize size, int? threads)
    {
        (_backend, _bytes, _threads) = (backend, size.CopyBytes, threads ?? 0);
        if (threads is null)
        {
            int rows = (int)(size.CopyBytes / sizeof(float) / size.Side);
            _copy = [backend.Allocate(rows, size.Side), backend.Allocate(rows, size.Side)];
            backend.Zero(_copy[0]);
        }
        else
        {
            // Written, since pages that were never written are all one page.
            _from = (byte*)NativeMemory.Alloc((nuint)_bytes);
            _to = (byte*)NativeMemory.Alloc((nuint)_bytes);
            NativeMemory.Fill(_from, (nuint)_bytes, 1);
        }

        _end = backend.Allocate(1, 1);
        _x = backend.Allocate(size.Rows, size.Side, TensorUse.Activation);
        _y = backend.Allocate(size.Rows, size.Side, TensorUse.Activation);
        backend.Upload(Values((long)size.Rows * size.Side), _x);
        fixed (float* square = Values((long)size.Side * size.Side))
        {
            var host = new HostMatrix((byte*)square, DType.F32, size.Side, size.Side);
            _weights[DType.F32] = backend.CreateWeight(host, DType.F32);
            _weights[DType.BF16] = backend.CreateWeight(host, DType.BF16);
        }
    }

    /// <summary>About normal; constants would make some devices faster than they are.</summary>
    public static float[] Values(long count)
    {
        var random = new SeededRandom(1);
        float[] values = new float[count];
        RandomCheckpoint.FillNormal(values, 0.02f, ref random);
        return values;
    }

    public override void Copy()
    {
        if (_copy.Length > 0)
        {
            _backend.Copy(_copy[0], _copy[1]);
            return;
        }

        long part = _bytes / _threads;
        Parallel.For(0, _threads, new ParallelOptions { MaxDegreeOfParallelism = _threads }, i =>
            Buffer.MemoryCopy(_from + (i * part), _to + (i * part), part, part));
    }

    public override void Multiply(DType weights) => _backend.Linear(_x, _weights[weights], null, _y, accumulate: false);

    public override void Wait() => _backend.Download(_end, _one);

    public override void Dispose()
    {
        foreach (DeviceWeight weight in _weights.Values)
        {
            weight.Dispose();
        }

        foreach (DeviceTensor tensor in _copy.Concat([_end, _x, _y]))
        {
            tensor.Dispose();
        }

        NativeMemory.Free(_from);
        NativeMemory.Free(_to);
        _from = null;
        _to = null;
    }
}
