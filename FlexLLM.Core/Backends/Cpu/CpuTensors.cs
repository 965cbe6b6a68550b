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

/// <summary>A dense row-major matrix.</summary>
internal sealed unsafe class CpuTensor(MemoryCounter counter, int rows, int columns) : DeviceTensor(rows, columns)
{
    private readonly NativeBuffer _buffer = new(counter, BytesOf(rows, columns));

    public override long Bytes => _buffer.Bytes;

    public float* Data => (float*)_buffer.Data;

    public static long BytesOf(int rows, int columns) => (long)rows * columns * sizeof(float);

    /// <summary>First element of a slice that must belong to this backend.</summary>
    public static float* Of(TensorSlice slice) =>
        ((CpuTensor)slice.Tensor).Data + ((long)slice.Start * slice.Columns);

    public override void Dispose() => _buffer.Dispose();
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

/// <summary>A LoRA pair with both matrices packed a second time, as panels over the rank.</summary>
internal sealed unsafe class CpuLora : DeviceLora
{
    private readonly CpuTensor _a;
    private readonly CpuTensor _bTransposed;

    public CpuLora(MemoryCounter counter, int inFeatures, int outFeatures, int rank)
        : base(inFeatures, outFeatures, rank)
    {
        Check.That(rank > 0);
        _a = new CpuTensor(counter, rank, inFeatures);
        _bTransposed = new CpuTensor(counter, rank, outFeatures);
        APanels = new CpuWeight(counter, rank, inFeatures, DType.F32);
        BPanels = new CpuWeight(counter, rank, outFeatures, DType.F32);
    }

    public override DeviceTensor A => _a;

    public override DeviceTensor BTransposed => _bTransposed;

    /// <summary>Panels [ceil(rank / 16)][in][16]: multiplies x into u.</summary>
    public CpuWeight APanels { get; }

    /// <summary>Panels [ceil(rank / 16)][out][16]: multiplies dy into du.</summary>
    public CpuWeight BPanels { get; }

    /// <summary>Rank rounded up to whole panels.</summary>
    public int RankPadded => APanels.Panels * PanelPacking.Width;

    public override long Bytes => _a.Bytes + _bTransposed.Bytes + APanels.Bytes + BPanels.Bytes;

    public void Refresh(ThreadTeam team)
    {
        APanels.Pack(team, new HostMatrix((byte*)_a.Data, DType.F32, Rank, InFeatures));
        BPanels.Pack(team, new HostMatrix((byte*)_bTransposed.Data, DType.F32, Rank, OutFeatures));
    }

    public override void Dispose()
    {
        _a.Dispose();
        _bTransposed.Dispose();
        APanels.Dispose();
        BPanels.Dispose();
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
