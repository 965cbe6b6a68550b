using System.Runtime.InteropServices;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// Host memory that indices leave for the device from. On a GPU it is pinned and a copy is only put into the stream: the host neither
/// waits for it nor for what the stream computes before it, as it would with memory of its own for each copy. What was copied stays
/// here until the device is known to have got that far.
/// </summary>
internal sealed unsafe class IndexStaging : IDisposable
{
    private readonly torch.Device _device;
    private readonly int _capacity;
    private readonly Action _wait;
    private readonly Tensor _host;
    private readonly long* _numbers;
    private readonly IDisposable? _pin;
    private int _used;

    /// <param name="device">Where copies go.</param>
    /// <param name="capacity">Numbers that it holds. Longer lists are copied from memory of their own.</param>
    /// <param name="wait">Waits until the device has done all that it was told to.</param>
    /// <param name="pin">
    /// Pins memory, given its address and bytes, until the result is disposed; null where nothing is to be pinned.
    /// </param>
    public IndexStaging(torch.Device device, int capacity, Action wait, Func<nint, long, IDisposable?>? pin = null)
    {
        (_device, _capacity, _wait) = (device, capacity, wait);
        _host = OnHost(capacity).DetachFromDisposeScope();
        fixed (byte* first = _host.bytes)
        {
            _numbers = (long*)first; // Native memory, which stays where it is.
        }

        _pin = pin?.Invoke((nint)_numbers, (long)capacity * sizeof(long));
    }

    /// <summary>A new tensor of the open scope on the device, with these numbers.</summary>
    public Tensor Copy(ReadOnlySpan<long> values)
    {
        if (values.Length > _capacity)
        {
            using Tensor own = OnHost(values.Length);
            values.CopyTo(MemoryMarshal.Cast<byte, long>(own.bytes));
            return own.to(_device, copy: true);
        }

        if (_used + values.Length > _capacity)
        {
            _wait();
            Arrived();
        }

        values.CopyTo(new Span<long>(_numbers + _used, values.Length));
        using Tensor part = _host.narrow(0, _used, values.Length);
        _used += values.Length;
        return part.to(_device, copy: true, non_blocking: true);
    }

    /// <summary>The device has done all that it was told to: what was copied is there, and its place here is free again.</summary>
    public void Arrived() => _used = 0;

    public void Dispose()
    {
        try
        {
            _wait();
        }
        catch (ExternalException)
        {
            // The device is lost, and reads nothing any more.
        }

        _pin?.Dispose();
        _host.Dispose();
    }

    private static Tensor OnHost(int count) => torch.empty((long)count, torch.ScalarType.Int64, new torch.Device(DeviceType.CPU));
}
