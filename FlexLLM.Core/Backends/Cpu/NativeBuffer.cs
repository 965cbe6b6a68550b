using System.Runtime.InteropServices;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>Bytes that are live in native memory. Safe to read from any thread.</summary>
internal sealed class MemoryCounter
{
    private long _bytes;

    public long Bytes => Interlocked.Read(ref _bytes);

    public void Add(long bytes) => Interlocked.Add(ref _bytes, bytes);
}

/// <summary>
/// Native memory aligned to a cache line. A further uncounted cache line of zeros follows it, so that kernels may load (not
/// store) whole vectors across the end. Freed by <see cref="Dispose"/> alone: kernels hold raw pointers, so a finalizer could
/// free memory under a running kernel.
/// </summary>
internal sealed unsafe class NativeBuffer : IDisposable
{
    private const int Alignment = 64;
    private readonly MemoryCounter _counter;
    private byte* _data;

    /// <summary>Allocates; contents are zeros, or undefined when <paramref name="zeroed"/> is false.</summary>
    public NativeBuffer(MemoryCounter counter, long bytes, bool zeroed = true)
    {
        Check.That(bytes >= 0);
        _counter = counter;
        Bytes = bytes;
        _data = (byte*)NativeMemory.AlignedAlloc((nuint)(bytes + Alignment), Alignment);
        NativeMemory.Clear(zeroed ? _data : _data + bytes, (nuint)(zeroed ? bytes + Alignment : Alignment));
        counter.Add(bytes);
    }

    /// <summary>Usable bytes.</summary>
    public long Bytes { get; }

    /// <summary>First byte; a broken invariant after disposal.</summary>
    public byte* Data
    {
        get
        {
            Check.That(_data != null);
            return _data;
        }
    }

    public void Dispose()
    {
        if (_data != null)
        {
            NativeMemory.AlignedFree(_data);
            _data = null;
            _counter.Add(-Bytes);
        }
    }
}
