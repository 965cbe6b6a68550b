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

    /// <summary>First element of a slice that must belong to this backend.</summary>
    public static float* Of(TensorSlice slice) =>
        ((CpuTensor)slice.Tensor).Data + ((long)slice.Start * slice.Columns);

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
        PanelBytes = (long)inFeatures * PanelPacking.Width * DTypes.BytesOf(type);
        _buffer = new NativeBuffer(counter, Panels * PanelBytes, zeroed: false);
    }

    public int Panels { get; }

    public long PanelBytes { get; }

    public override long Bytes => _buffer.Bytes;

    public byte* Data => _buffer.Data;

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
/// [layer][block][KV head] of a key tile [headDim][16 positions], transposed for scores as outputs, and a value tile
/// [16 positions][headDim rounded up to 16] for output columns as outputs.
/// </summary>
internal sealed unsafe class CpuKvCache : DeviceKvCache
{
    private readonly NativeBuffer _buffer;

    public CpuKvCache(MemoryCounter counter, int layers, int blocks, int kvHeads, int headDim)
        : base(layers, blocks, kvHeads, headDim)
    {
        ValueColumns = PanelPacking.Count(headDim) * PanelPacking.Width;
        KeyFloats = headDim * TokensPerBlock;
        HeadFloats = KeyFloats + (TokensPerBlock * ValueColumns);
        _buffer = new NativeBuffer(counter, (long)layers * blocks * kvHeads * HeadFloats * sizeof(float), zeroed: false);
    }

    /// <summary>Floats from one value row to the next.</summary>
    public int ValueColumns { get; }

    /// <summary>Floats of the key tile, in front of the value tile.</summary>
    public int KeyFloats { get; }

    /// <summary>Floats of one KV head in one block.</summary>
    public int HeadFloats { get; }

    public override long Bytes => _buffer.Bytes;

    /// <summary>First float of a layer.</summary>
    public float* Layer(int layer)
    {
        Check.That(layer >= 0 && layer < Layers);
        return (float*)_buffer.Data + ((long)layer * Blocks * KvHeads * HeadFloats);
    }

    public override void Dispose() => _buffer.Dispose();
}
