using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>What the operations share: threads, scratch memory and the byte count.</summary>
internal sealed class CpuContext : IDisposable
{
    public CpuContext(int threads)
    {
        Team = new ThreadTeam(threads);
        Workspace = new Workspace(Memory);
    }

    public MemoryCounter Memory { get; } = new();

    public ThreadTeam Team { get; }

    public Workspace Workspace { get; }

    public void Dispose()
    {
        Team.Dispose();
        Workspace.Dispose();
    }
}

/// <summary>A dense row-major matrix, in memory of its own or inside another one's.</summary>
internal sealed unsafe class CpuTensor : DeviceTensor
{
    private readonly NativeBuffer _buffer;
    private readonly long _offset;
    private readonly bool _isView;

    public CpuTensor(MemoryCounter counter, int rows, int columns)
        : base(rows, columns)
    {
        _buffer = new NativeBuffer(counter, (long)rows * columns * sizeof(float));
    }

    public CpuTensor(CpuTensor owner, long offset, int rows, int columns)
        : base(rows, columns)
    {
        Check.That(offset >= 0 && offset % 16 == 0 && offset + ((long)rows * columns) <= (long)owner.Rows * owner.Columns);
        (_buffer, _offset, _isView) = (owner._buffer, owner._offset + offset, true);
    }

    public override long Bytes => _isView ? 0 : _buffer.Bytes;

    public float* Data => (float*)_buffer.Data + _offset;

    public static long BytesOf(int rows, int columns) => (long)rows * columns * sizeof(float);

    /// <summary>First element of a slice that must belong to this backend.</summary>
    public static float* Of(TensorSlice slice) =>
        ((CpuTensor)slice.Tensor).Data + ((long)slice.Start * slice.Columns);

    /// <summary>Elements of a slice, row by row.</summary>
    public static Span<float> SpanOf(TensorSlice slice) => new(Of(slice), checked(slice.Rows * slice.Columns));

    public override void Dispose()
    {
        if (!_isView)
        {
            _buffer.Dispose();
        }
    }
}

/// <summary>Weight panels: see <see cref="PanelPacking"/>.</summary>
internal sealed unsafe class CpuWeight : DeviceWeight
{
    private readonly NativeBuffer _buffer;

    public CpuWeight(MemoryCounter counter, int outFeatures, int inFeatures, DType type)
        : base(outFeatures, inFeatures, type)
    {
        Check.That(type is DType.F32 or DType.BF16);
        Panels = PanelPacking.Count(outFeatures);
        PanelBytes = PanelBytesOf(inFeatures, type);
        _buffer = new NativeBuffer(counter, BytesOf(outFeatures, inFeatures, type), zeroed: false);
    }

    public int Panels { get; }

    public long PanelBytes { get; }

    public override long Bytes => _buffer.Bytes;

    public byte* Data => _buffer.Data;

    public static long BytesOf(int outFeatures, int inFeatures, DType type) =>
        PanelPacking.Count(outFeatures) * PanelBytesOf(inFeatures, type);

    public void Pack(ThreadTeam team, in HostMatrix source)
    {
        Check.That(source.Rows == OutFeatures);
        Check.That(source.Columns == InFeatures);
        if (Type == DType.BF16)
        {
            PanelPacking.Pack<BF16Panel>(team, source, Data);
        }
        else
        {
            PanelPacking.Pack<F32Panel>(team, source, Data);
        }
    }

    public override void Dispose() => _buffer.Dispose();

    private static long PanelBytesOf(int inFeatures, DType type) =>
        (long)inFeatures * PanelPacking.Width * DTypes.BytesOf(type);
}

/// <summary>A bypass matrix, packed a second time as panels over its inner side.</summary>
internal sealed unsafe class CpuFactor : DeviceFactor
{
    private readonly CpuTensor _values;

    public CpuFactor(MemoryCounter counter, int inner, int wide)
        : base(inner, wide)
    {
        Check.That(inner > 0 && wide > 0);
        _values = new CpuTensor(counter, inner, wide);
        Panels = new CpuWeight(counter, inner, wide, DType.F32);
    }

    public override DeviceTensor Values => _values;

    /// <summary>Row-major [Inner, Wide]: what widens.</summary>
    public float* Data => _values.Data;

    /// <summary>Panels [ceil(inner / 16)][wide][16]: what narrows.</summary>
    public CpuWeight Panels { get; }

    /// <summary>Inner rounded up to whole panels.</summary>
    public int InnerPadded => Panels.Panels * PanelPacking.Width;

    public override long Bytes => _values.Bytes + Panels.Bytes;

    public void Refresh(ThreadTeam team) => Panels.Pack(team, new HostMatrix((byte*)_values.Data, DType.F32, Inner, Wide));

    public override void Dispose()
    {
        _values.Dispose();
        Panels.Dispose();
    }
}

/// <summary>
/// Extents of blocks, in each [layer][block][KV head] of a key tile [headDim][16 positions], transposed for scores as outputs,
/// and a value tile [16 positions][headDim rounded up to 16] for output columns as outputs.
/// </summary>
internal sealed unsafe class CpuKvCache : DeviceKvCache
{
    private readonly MemoryCounter _counter;
    private readonly List<NativeBuffer> _extents = [];

    public CpuKvCache(MemoryCounter counter, int layers, int blocks, int kvHeads, int headDim)
        : base(layers, 0, kvHeads, headDim)
    {
        _counter = counter;
        ValueColumns = ValueColumnsOf(headDim);
        KeyFloats = headDim * TokensPerBlock;
        HeadFloats = HeadFloatsOf(headDim);
        Resize(blocks);
    }

    /// <summary>Floats from one value row to the next.</summary>
    public int ValueColumns { get; }

    /// <summary>Floats of the key tile, in front of the value tile.</summary>
    public int KeyFloats { get; }

    /// <summary>Floats of one KV head in one block.</summary>
    public int HeadFloats { get; }

    public override long Bytes => _extents.Sum(e => e.Bytes);

    /// <summary>Head dimension rounded up to whole panels.</summary>
    public static int ValueColumnsOf(int headDim) => PanelPacking.Count(headDim) * PanelPacking.Width;

    public static long BytesOf(int layers, int blocks, int kvHeads, int headDim) =>
        (long)layers * blocks * kvHeads * HeadFloatsOf(headDim) * sizeof(float);

    /// <summary>First float of a layer of a block, which the cache must have.</summary>
    public float* Block(int layer, int block)
    {
        Check.That((uint)layer < (uint)Layers && (uint)block < (uint)Blocks);
        int extent = block / BlocksPerExtent;
        int inExtent = Math.Min(BlocksPerExtent, Blocks - (extent * BlocksPerExtent));
        long index = ((long)layer * inExtent) + (block % BlocksPerExtent);
        return (float*)_extents[extent].Data + (index * KvHeads * HeadFloats);
    }

    public void Resize(int blocks)
    {
        CheckResize(blocks);
        int before = _extents.Count;
        try
        {
            for (int first = before * BlocksPerExtent; first < blocks; first += BlocksPerExtent)
            {
                int count = Math.Min(BlocksPerExtent, blocks - first);
                _extents.Add(new NativeBuffer(_counter, BytesOf(Layers, count, KvHeads, HeadDim), zeroed: false));
            }
        }
        catch
        {
            Drop(before);
            throw;
        }

        Drop((blocks + BlocksPerExtent - 1) / BlocksPerExtent);
        Blocks = blocks;
    }

    public override void Dispose()
    {
        Drop(0);
        Blocks = 0;
    }

    private void Drop(int extentsKept)
    {
        for (int i = _extents.Count - 1; i >= extentsKept; i--)
        {
            _extents[i].Dispose();
            _extents.RemoveAt(i);
        }
    }

    private static int HeadFloatsOf(int headDim) => TokensPerBlock * (headDim + ValueColumnsOf(headDim));
}
