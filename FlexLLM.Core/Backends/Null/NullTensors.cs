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

/// <summary>A matrix without elements.</summary>
internal sealed class NullTensor(NullMemory memory, int rows, int columns) : DeviceTensor(rows, columns)
{
    private readonly NullBuffer _buffer = new(memory, BytesOf(rows, columns));

    public override long Bytes => _buffer.Bytes;

    public bool IsDisposed => _buffer.IsDisposed;

    public static long BytesOf(int rows, int columns) => (long)rows * columns * sizeof(float);

    public override void Dispose() => _buffer.Dispose();
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

/// <summary>A LoRA pair without elements.</summary>
internal sealed class NullLora(NullMemory memory, int inFeatures, int outFeatures, int rank)
    : DeviceLora(inFeatures, outFeatures, rank)
{
    private readonly NullTensor _a = new(memory, rank, inFeatures);
    private readonly NullTensor _bTransposed = new(memory, rank, outFeatures);

    public override DeviceTensor A => _a;

    public override DeviceTensor BTransposed => _bTransposed;

    public override long Bytes => _a.Bytes + _bTransposed.Bytes;

    public bool IsDisposed => _a.IsDisposed;

    public override void Dispose()
    {
        _a.Dispose();
        _bTransposed.Dispose();
    }
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
