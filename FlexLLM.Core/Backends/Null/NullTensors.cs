using FlexLLM.Primitives;

namespace FlexLLM.Backends.Null;

/// <summary>Bytes that a real device would hold for the tensors of a backend.</summary>
internal sealed class NullMemory
{
    public long Bytes { get; set; }
}

/// <summary>A share of <see cref="NullMemory"/>, given back once.</summary>
internal sealed class NullBuffer : IDisposable
{
    private readonly NullMemory _memory;

    public NullBuffer(NullMemory memory, long bytes)
    {
        Check.That(bytes >= 0);
        _memory = memory;
        Bytes = bytes;
        memory.Bytes += bytes;
    }

    public long Bytes { get; }

    public bool IsDisposed { get; private set; }

    public void Dispose()
    {
        _memory.Bytes -= IsDisposed ? 0 : Bytes;
        IsDisposed = true;
    }
}

/// <summary>A matrix without elements, in memory of its own or inside another one's.</summary>
internal sealed class NullTensor : DeviceTensor
{
    private readonly NullBuffer _buffer;
    private readonly bool _isView;

    public NullTensor(NullMemory memory, int rows, int columns)
        : base(rows, columns)
    {
        _buffer = new NullBuffer(memory, (long)rows * columns * sizeof(float));
    }

    public NullTensor(NullTensor owner, long offset, int rows, int columns)
        : base(rows, columns)
    {
        Check.That(offset >= 0 && offset % 16 == 0 && offset + ((long)rows * columns) <= (long)owner.Rows * owner.Columns);
        (_buffer, _isView) = (owner._buffer, true);
    }

    public override long Bytes => _isView ? 0 : _buffer.Bytes;

    public bool IsDisposed => _buffer.IsDisposed;

    public static long BytesOf(int rows, int columns) => (long)rows * columns * sizeof(float);

    public override void Dispose()
    {
        if (!_isView)
        {
            _buffer.Dispose();
        }
    }
}

/// <summary>A weight without elements.</summary>
internal sealed class NullWeight(NullMemory memory, int outFeatures, int inFeatures, DType type)
    : DeviceWeight(outFeatures, inFeatures, type)
{
    private readonly NullBuffer _buffer = new(memory, BytesOf(outFeatures, inFeatures, type));

    public override long Bytes => _buffer.Bytes;

    public bool IsDisposed => _buffer.IsDisposed;

    public static long BytesOf(int outFeatures, int inFeatures, DType type) =>
        (long)outFeatures * inFeatures * DTypes.BytesOf(type);

    public override void Dispose() => _buffer.Dispose();
}

/// <summary>A bypass matrix without elements.</summary>
internal sealed class NullFactor(NullMemory memory, int inner, int wide) : DeviceFactor(inner, wide)
{
    private readonly NullTensor _values = new(memory, inner, wide);

    public override DeviceTensor Values => _values;

    public override long Bytes => _values.Bytes;

    public bool IsDisposed => _values.IsDisposed;

    public override void Dispose() => _values.Dispose();
}

/// <summary>A KV cache without elements.</summary>
internal sealed class NullKvCache(NullMemory memory, int layers, int blocks, int kvHeads, int headDim)
    : DeviceKvCache(layers, blocks, kvHeads, headDim)
{
    private NullBuffer _buffer = new(memory, BytesOf(layers, blocks, kvHeads, headDim));

    public override long Bytes => _buffer.Bytes;

    public bool IsDisposed => _buffer.IsDisposed;

    public static long BytesOf(int layers, int blocks, int kvHeads, int headDim) =>
        2L * layers * blocks * TokensPerBlock * kvHeads * headDim * sizeof(float);

    public void Resize(int blocks)
    {
        CheckResize(blocks);
        Check.That(!IsDisposed);
        _buffer.Dispose();
        _buffer = new NullBuffer(memory, BytesOf(Layers, blocks, KvHeads, HeadDim));
        Blocks = blocks;
    }

    public override void Dispose() => _buffer.Dispose();
}
