using System.Runtime.InteropServices;
using FlexLLM.Backends.Cpu;
using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// A dense row-major matrix, in memory of its own or inside another one's. A matrix inside another holds no native tensor, its owner
/// keeps those for all: the memory is gone with its owner, whoever still has a view.
/// </summary>
internal sealed class TorchTensor : DeviceTensor
{
    private readonly TorchTensor _owner;
    private readonly long _offset;
    private readonly KeptViews? _views;
    private readonly SharedRounding _rounding;
    private readonly DType _type;
    private OwnedMemory? _memory;

    public TorchTensor(TorchContext context, int rows, int columns, DType type = DType.F32)
        : base(rows, columns)
    {
        (_owner, _memory, _views) = (this, OwnedMemory.Zeros(context, rows, columns, type), new KeptViews());
        (_rounding, _type) = (context.Rounding, type);
    }

    public TorchTensor(TorchTensor owner, long offset, int rows, int columns)
        : base(rows, columns)
    {
        Check.That(offset >= 0 && offset % 16 == 0 && offset + ((long)rows * columns) <= (long)owner.Rows * owner.Columns);
        (_owner, _offset, _rounding, _type) = (owner._owner, owner._offset + offset, owner._rounding, owner._type);
    }

    public override DType Type => _type;

    public override long Bytes => _memory?.Bytes ?? 0;

    public static long BytesOf(int rows, int columns, DType type = DType.F32) => (long)rows * columns * DTypes.BytesOf(type);

    /// <summary>Rows [start, start + count) as a tensor of that shape, which the owner keeps.</summary>
    public Tensor Part(int start, int count, in ViewShape shape)
    {
        _rounding.Touch(_owner, First(start), (long)count * Columns);
        return ViewOf(start, shape);
    }

    /// <summary>The same, only to be read, so that what was rounded of it stays.</summary>
    public Tensor PartToRead(int start, int count) => ViewOf(start, ViewShape.Matrix(count, Columns));

    /// <summary>Rows [start, start + count) in BF16, only to be read, and only by the operation in progress.</summary>
    public Tensor Rounded(int start, int count) => _type == DType.BF16
        ? PartToRead(start, count)
        : _rounding.Of(_owner, First(start), (long)count * Columns, PartToRead(start, count));

    /// <summary>A rectangle as a tensor of the scope that is open.</summary>
    public Tensor Part(Rectangle place)
    {
        _rounding.Touch(_owner, _offset + place.Start, place.End - place.Start);
        return PartToRead(place);
    }

    /// <summary>The same, only to be read. Nothing is kept of it, for it may be another device's thread that reads.</summary>
    public Tensor PartToRead(Rectangle place)
    {
        Check.That(_owner._memory is not null);
        return _owner._memory.Tensor.as_strided([place.Rows, place.Columns], [place.Stride, 1], _offset + place.Start);
    }

    /// <summary>Whether a row of this tensor is where a row of another one is.</summary>
    public bool IsAt(TorchTensor other, int row, int otherRow) =>
        _owner == other._owner && First(row) == other.First(otherRow);

    public override void Dispose()
    {
        if (_memory is not null)
        {
            _rounding.Touch(this, 0, (long)Rows * Columns);
            _views!.Dispose();
            _memory.Dispose();
            _memory = null;
        }
    }

    // In elements of the owner.
    private long First(int row) => _offset + ((long)row * Columns);

    private Tensor ViewOf(int start, in ViewShape shape)
    {
        OwnedMemory? memory = _owner._memory;
        Check.That(memory is not null);
        return _owner._views!.Of(memory.Tensor, First(start), shape);
    }
}

/// <summary>
/// Packed rows in the type that they are made of: two BF16 a float, or four bytes of bits. Only <see cref="PackOps"/> and copies of rows
/// know it.
/// </summary>
internal sealed class TorchPacked : DeviceTensor
{
    private readonly OwnedMemory _memory;

    /// <param name="context">The device.</param>
    /// <param name="rows">Rows.</param>
    /// <param name="columns">Floats a row.</param>
    /// <param name="format">Of what.</param>
    public TorchPacked(TorchContext context, int rows, int columns, PackedFormat format)
        : base(rows, columns) =>
        (Format, _memory) = (format, format == PackedFormat.BF16
            ? OwnedMemory.Zeros(context, rows, 2L * columns, torch.ScalarType.BFloat16, sizeof(float) / 2)
            : OwnedMemory.Zeros(context, rows, 4L * columns, torch.ScalarType.Byte, sizeof(byte)));

    public PackedFormat Format { get; }

    public override long Bytes => _memory.Bytes;

    /// <summary>Rows [start, start + count) as a tensor of the scope that is open.</summary>
    public Tensor Part(int start, int count) => _memory.Tensor.narrow(0, start, count);

    public void CopyRows(int start, int count, TorchPacked destination, int destinationStart)
    {
        Check.That(destination.Format == Format);
        using DisposeScope scope = torch.NewDisposeScope();
        destination.Part(destinationStart, count).copy_(Part(start, count));
    }

    public override void Dispose() => _memory.Dispose();
}

/// <summary>A native tensor that belongs to no scope, counted as long as it lives.</summary>
internal sealed class OwnedMemory : IDisposable
{
    private readonly MemoryCounter _counter;
    private Tensor? _tensor;

    private OwnedMemory(TorchContext context, Func<Tensor> allocate, long bytes)
    {
        try
        {
            _tensor = allocate().DetachFromDisposeScope();
        }
        catch (ExternalException e) when (MemoryFault.Is(e))
        {
            throw new InsufficientMemoryException($"{context.Name} could not allocate {bytes} bytes: {e.Message.Split('\n')[0]}", e);
        }

        (_counter, Bytes) = (context.Memory, bytes);
        _counter.Add(bytes);
    }

    public long Bytes { get; private set; }

    public Tensor Tensor
    {
        get
        {
            Check.That(_tensor is not null);
            return _tensor;
        }
    }

    public static OwnedMemory Zeros(TorchContext context, long rows, long columns, DType type) =>
        Zeros(context, rows, columns, TorchContext.ScalarTypeOf(type), DTypes.BytesOf(type));

    public static OwnedMemory Zeros(TorchContext context, long rows, long columns, torch.ScalarType type, int elementBytes) => new(
        context, () => torch.zeros(rows, columns, type, context.Device), rows * columns * elementBytes);

    public static OwnedMemory Matrix(TorchContext context, long rows, long columns, DType type) => new(
        context, () => torch.empty(rows, columns, TorchContext.ScalarTypeOf(type), context.Device), rows * columns * DTypes.BytesOf(type));

    public static OwnedMemory Cube(TorchContext context, long first, long second, long third, DType type) => new(
        context, () => torch.empty(first, second, third, TorchContext.ScalarTypeOf(type), context.Device),
        first * second * third * DTypes.BytesOf(type));

    public void Dispose()
    {
        if (_tensor is not null)
        {
            _tensor.Dispose();
            _tensor = null;
            _counter.Add(-Bytes);
            Bytes = 0;
        }
    }
}

/// <summary>W [out, in], row-major, F32 or BF16.</summary>
internal sealed class TorchWeight : DeviceWeight
{
    private readonly OwnedMemory _memory;
    private Tensor? _turned;

    public TorchWeight(TorchContext context, in HostMatrix source, DType type)
        : base(source.Rows, source.Columns, type)
    {
        Check.That(type is DType.F32 or DType.BF16);
        _memory = OwnedMemory.Matrix(context, source.Rows, source.Columns, type);
        try
        {
            context.Upload(source, _memory.Tensor);
        }
        catch (Exception e)
        {
            _memory.Dispose();
            if (e is ExternalException && MemoryFault.Is(e))
            {
                throw new InsufficientMemoryException($"{context.Name} ran full while a weight was copied there.", e);
            }

            throw;
        }
    }

    public override long Bytes => _memory.Bytes;

    /// <summary>As stored.</summary>
    public Tensor Values => _memory.Tensor;

    /// <summary>The same memory as [in, out]; it stays this object's.</summary>
    public Tensor Turned => _turned ??= Values.t().DetachFromDisposeScope();

    public static long BytesOf(int outFeatures, int inFeatures, DType type) =>
        (long)outFeatures * inFeatures * DTypes.BytesOf(type);

    public override void Dispose()
    {
        _turned?.Dispose();
        _turned = null;
        _memory.Dispose();
    }
}

/// <summary>A bypass matrix; nothing is derived from it.</summary>
internal sealed class TorchFactor : DeviceFactor
{
    private readonly TorchTensor _values;

    public TorchFactor(TorchContext context, int inner, int wide)
        : base(inner, wide)
    {
        Check.That(inner > 0 && wide > 0);
        _values = new TorchTensor(context, inner, wide);
    }

    public override DeviceTensor Values => _values;

    public override long Bytes => _values.Bytes;

    public override void Dispose() => _values.Dispose();
}

/// <summary>
/// Keys and values of a layer, each [KV heads, blocks * 16, head dimension], F32 or BF16: what attention gathers lies head by head, as
/// its products want it, without another copy where it is F32.
/// </summary>
internal sealed class TorchKvCache : DeviceKvCache
{
    private readonly TorchContext _context;
    private readonly OwnedMemory[] _keys;
    private readonly OwnedMemory[] _values;

    public TorchKvCache(TorchContext context, int layers, int blocks, int kvHeads, int headDim)
        : base(layers, 0, kvHeads, headDim)
    {
        _context = context;
        _keys = new OwnedMemory[layers];
        _values = new OwnedMemory[layers];
        try
        {
            for (int layer = 0; layer < layers; layer++)
            {
                _keys[layer] = Create(blocks);
                _values[layer] = Create(blocks);
            }
        }
        catch
        {
            Dispose();
            throw;
        }

        Blocks = blocks;
    }

    public override DType Type => _context.KvType;

    public override long Bytes => _keys.Concat(_values).Sum(memory => memory?.Bytes ?? 0);

    public static long BytesOf(int layers, int blocks, int kvHeads, int headDim, DType type) =>
        2L * layers * blocks * TokensPerBlock * kvHeads * headDim * DTypes.BytesOf(type);

    /// <summary>
    /// Keys and values at these slots, each F32 [KV heads, slots, head dimension]. Of BF16 no more than one is there in both types.
    /// </summary>
    public (Tensor Keys, Tensor Values) Read(int layer, Tensor slots) => (Read(_keys, layer, slots), Read(_values, layer, slots));

    /// <summary>The same as they are stored.</summary>
    public (Tensor Keys, Tensor Values) ReadStored(int layer, Tensor slots) =>
        (Of(_keys, layer).index_select(1, slots), Of(_values, layer).index_select(1, slots));

    /// <summary>
    /// Writes keys and values of a type, each [KV heads, slots, head dimension]; what becomes BF16 is rounded to nearest even.
    /// </summary>
    public void Write(int layer, Tensor slots, Tensor keys, Tensor values, DType type)
    {
        Write(_keys, layer, slots, keys, type);
        Write(_values, layer, slots, values, type);
    }

    /// <summary>
    /// Moves one tensor after the other, so that no more than one of them exists twice. Where memory runs out on the way the cache
    /// keeps its blocks; tensors that were moved by then stay larger than they need be, and are counted as they are.
    /// </summary>
    public void Resize(int blocks)
    {
        CheckResize(blocks);
        if (blocks == Blocks)
        {
            return;
        }

        long kept = (long)Math.Min(blocks, Blocks) * TokensPerBlock;
        for (int layer = 0; layer < Layers; layer++)
        {
            Move(ref _keys[layer], blocks, kept);
            Move(ref _values[layer], blocks, kept);
        }

        Blocks = blocks;
    }

    /// <summary>Where positions [first, first + slots.Length) of a sequence lie.</summary>
    public void Place(in AttentionSegment segment, int first, Span<long> slots)
    {
        for (int i = 0; i < slots.Length;)
        {
            (int index, int offset) = int.DivRem(first + i, TokensPerBlock);
            Check.That((uint)index < (uint)segment.BlockTable.Length);
            int block = segment.BlockTable[index];
            Check.That((uint)block < (uint)Blocks);
            long slot = ((long)block * TokensPerBlock) + offset;
            for (int end = Math.Min(slots.Length, i + TokensPerBlock - offset); i < end; i++)
            {
                slots[i] = slot++;
            }
        }
    }

    public override void Dispose()
    {
        foreach (OwnedMemory? memory in _keys.Concat(_values))
        {
            memory?.Dispose();
        }

        Blocks = 0;
    }

    private Tensor Read(OwnedMemory[] memory, int layer, Tensor slots)
    {
        Tensor stored = Of(memory, layer).index_select(1, slots);
        if (Type == DType.F32)
        {
            return stored;
        }

        using (stored)
        {
            return stored.to_type(torch.ScalarType.Float32);
        }
    }

    private void Write(OwnedMemory[] memory, int layer, Tensor slots, Tensor rows, DType type)
    {
        Tensor stored = Of(memory, layer);
        if (Type == type)
        {
            stored.index_copy_(1, slots, rows);
            return;
        }

        using Tensor converted = rows.to_type(TorchContext.ScalarTypeOf(Type));
        stored.index_copy_(1, slots, converted);
    }

    private OwnedMemory Create(int blocks) => OwnedMemory.Cube(_context, KvHeads, (long)blocks * TokensPerBlock, HeadDim, Type);

    private Tensor Of(OwnedMemory[] memory, int layer)
    {
        Check.That((uint)layer < (uint)Layers);
        return memory[layer].Tensor;
    }

    private void Move(ref OwnedMemory memory, int blocks, long kept)
    {
        OwnedMemory moved = Create(blocks);
        if (kept > 0)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            moved.Tensor.narrow(1, 0, kept).copy_(memory.Tensor.narrow(1, 0, kept));
        }

        memory.Dispose();
        memory = moved;
    }
}
