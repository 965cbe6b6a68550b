using System.Runtime.CompilerServices;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>Writing the KV cache, and causal attention over it for segments of decode, prefill and finetuning rows.</summary>
internal static unsafe class AttentionForward
{
    // Rows (position, query head of the group) that share each key and value tile; a multiple of the register tile.
    private const int RowsPerTile = 48;

    public static void AppendKv(
        CpuContext cpu, TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        Check.That(k.Rows == v.Rows && k.Columns == v.Columns);
        foreach (ref readonly AttentionSegment segment in segments)
        {
            CpuKvCache cache = (CpuKvCache)segment.Cache;
            Check.That(k.Columns == cache.KvHeads * cache.HeadDim);
            Check.That(segment.RowStart + segment.RowCount <= k.Rows);
            KvView view = new(cache, PlaceBlocks(cpu, layer, [segment]));
            for (int i = 0; i < segment.RowCount; i++)
            {
                for (int head = 0; head < cache.KvHeads; head++)
                {
                    long source = ((long)(segment.RowStart + i) * k.Columns) + ((long)head * cache.HeadDim);
                    Append(view, head, CpuTensor.Of(k) + source, CpuTensor.Of(v) + source, segment.PositionStart + i);
                }
            }
        }
    }

    public static void Run(CpuContext cpu, TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        Check.That(q.Rows == o.Rows && q.Columns == o.Columns);
        if (segments.Length == 0)
        {
            return;
        }

        float** tables = PlaceBlocks(cpu, layer, segments);
        Segment* all = (Segment*)cpu.Workspace.Bytes(WorkspaceSlot.AttentionSegments, SegmentBytes(segments.Length));
        int items = 0;
        int context = 0;
        int widest = 0;
        long work = 0;
        for (int i = 0; i < segments.Length; i++)
        {
            AttentionSegment segment = segments[i];
            all[i] = new Segment(segment, q, o, tables, items);
            tables += BlocksOf(segment);
            items += all[i].Items;
            context = Math.Max(context, segment.PositionStart + segment.RowCount);
            widest = Math.Max(widest, all[i].Kv.ValueColumns);
            work += 2L * segment.RowCount * q.Columns * (segment.PositionStart + segment.RowCount);
        }

        int stride = AttentionTiles.ScoreStride(context);
        long scratchFloats = TileFloats(context, widest);
        float* scratch = cpu.Workspace.Floats(WorkspaceSlot.AttentionScratch, scratchFloats * cpu.Team.Threads);
        cpu.Team.Run(new Job(all, segments.Length, scratch, scratchFloats, stride), items, work);
    }

    /// <summary>
    /// Where the blocks of each segment's positions lie in a layer, one segment after the other, in native memory, where workers
    /// can read it.
    /// </summary>
    public static float** PlaceBlocks(CpuContext cpu, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        long count = 0;
        foreach (ref readonly AttentionSegment segment in segments)
        {
            Check.That(segment.RowStart >= 0 && segment.RowCount >= 0 && segment.PositionStart >= 0);
            Check.That(segment.BlockTable.Length >= BlocksOf(segment));
            count += BlocksOf(segment);
        }

        float** places = (float**)cpu.Workspace.Bytes(WorkspaceSlot.BlockTables, TableBytes(count));
        float** next = places;
        foreach (ref readonly AttentionSegment segment in segments)
        {
            CpuKvCache cache = (CpuKvCache)segment.Cache;
            Check.That((uint)layer < (uint)cache.Layers);
            foreach (int block in segment.BlockTable.AsSpan(0, BlocksOf(segment)))
            {
                *next++ = cache.Block(layer, block);
            }
        }

        return places;
    }

    /// <summary>Bytes of the places of so many blocks.</summary>
    public static long TableBytes(long blocks) => blocks * sizeof(float*);

    /// <summary>Bytes of what workers read about so many segments.</summary>
    public static long SegmentBytes(int segments) => (long)segments * sizeof(Segment);

    /// <summary>Floats that a thread needs for a tile of rows with up to so many positions.</summary>
    public static long TileFloats(int context, int valueColumns) =>
        RowsPerTile * ((long)AttentionTiles.ScoreStride(context) + (2 * valueColumns));

    private static int BlocksOf(in AttentionSegment segment) => PanelPacking.Count(segment.PositionStart + segment.RowCount);

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void Append(in KvView view, int head, float* k, float* v, int position)
    {
        int offset = position % AttentionTiles.Block;
        float* keys = view.Keys(head, position / AttentionTiles.Block) + offset;
        for (int d = 0; d < view.HeadDim; d++)
        {
            keys[d * AttentionTiles.Block] = k[d];
        }

        float* values = view.Values(head, position / AttentionTiles.Block) + ((long)offset * view.ValueColumns);
        new ReadOnlySpan<float>(v, view.HeadDim).CopyTo(new Span<float>(values, view.HeadDim));
    }

    private readonly struct Segment
    {
        public readonly KvView Kv;
        public readonly float* Q;
        public readonly float* O;
        public readonly float* LogSumExp;
        public readonly int Columns;
        public readonly int PositionStart;
        public readonly int QueryHeads;
        public readonly int Group;
        public readonly int Rows;
        public readonly int Tiles;
        public readonly int FirstItem;
        public readonly int Items;

        public Segment(in AttentionSegment segment, TensorSlice q, TensorSlice o, float** blocks, int firstItem)
        {
            CpuKvCache cache = (CpuKvCache)segment.Cache;
            Check.That(segment.RowStart + segment.RowCount <= q.Rows);
            QueryHeads = q.Columns / cache.HeadDim;
            Group = QueryHeads / cache.KvHeads;
            Check.That(Group > 0 && Group * cache.KvHeads * cache.HeadDim == q.Columns);
            DeviceTensor? lse = segment.LogSumExp;
            Check.That(lse is null || lse.Columns == QueryHeads);
            Check.That(lse is null || lse.Rows >= segment.PositionStart + segment.RowCount);
            Kv = new KvView(cache, blocks);
            Columns = q.Columns;
            Q = CpuTensor.Of(q) + ((long)segment.RowStart * Columns);
            O = CpuTensor.Of(o) + ((long)segment.RowStart * Columns);
            LogSumExp = lse is null ? null : CpuTensor.Of(lse);
            PositionStart = segment.PositionStart;
            Rows = segment.RowCount * Group;
            Tiles = (Rows + RowsPerTile - 1) / RowsPerTile;
            FirstItem = firstItem;
            Items = Tiles * cache.KvHeads;
        }
    }

    // One item: a tile of rows of one KV head of one segment.
    private readonly struct Job(Segment* segments, int count, float* scratch, long scratchFloats, int stride) : IParallelJob
    {
        private readonly Segment* _segments = segments;
        private readonly int _count = count;
        private readonly float* _scratch = scratch;
        private readonly long _scratchFloats = scratchFloats;
        private readonly int _stride = stride;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int s = _count - 1;
            while (_segments[s].FirstItem > item)
            {
                s--;
            }

            ref readonly Segment segment = ref _segments[s];

            // Late positions cost most: they come first.
            int tile = segment.Tiles - 1 - ((item - segment.FirstItem) % segment.Tiles);
            int head = (item - segment.FirstItem) / segment.Tiles;
            float* scratch = _scratch + (worker * _scratchFloats);
            RunTile(segment, head, tile * RowsPerTile, scratch);
        }

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void RunTile(in Segment segment, int head, int first, float* scratch)
        {
            int rows = Math.Min(RowsPerTile, segment.Rows - first);
            ref readonly KvView kv = ref segment.Kv;
            int headDim = kv.HeadDim;
            float* scores = scratch;
            float* q = scores + (RowsPerTile * (long)_stride);
            float* o = q + (RowsPerTile * kv.ValueColumns);
            float scale = AttentionTiles.ScoreScale(headDim);
            int* contexts = stackalloc int[RowsPerTile];
            float* sums = stackalloc float[RowsPerTile];
            for (int i = 0; i < rows; i++)
            {
                contexts[i] = segment.PositionStart + ((first + i) / segment.Group) + 1;
                float* source = segment.Q + Offset(segment, head, first + i, headDim);
                AttentionTiles.Scale(source, scale, q + (i * kv.ValueColumns), headDim);
            }

            int blocks = (contexts[rows - 1] + AttentionTiles.Block - 1) / AttentionTiles.Block;
            AttentionTiles.Scores(kv, head, q, rows, blocks, scores, _stride);
            for (int i = 0; i < rows; i++)
            {
                float* row = scores + (i * (long)_stride);
                float max = VectorMath.Max(row, contexts[i]);
                sums[i] = SumOfExponentials(row, max, contexts[i]);
                if (segment.LogSumExp != null)
                {
                    long place = ((contexts[i] - 1L) * segment.QueryHeads) + QueryHead(segment, head, first + i);
                    segment.LogSumExp[place] = (float)(max + Math.Log(sums[i]));
                }
            }

            WeighValues(kv, head, scores, rows, contexts, blocks, o);
            for (int i = 0; i < rows; i++)
            {
                float* destination = segment.O + Offset(segment, head, first + i, headDim);
                AttentionTiles.Scale(o + (i * kv.ValueColumns), 1f / sums[i], destination, headDim);
            }
        }

        // o_i = sum over j < contexts[i], ascending, of scores[i][j] * v_j.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void WeighValues(in KvView kv, int head, float* scores, int rows, int* contexts, int blocks, float* o)
        {
            int* counts = stackalloc int[RowsPerTile];
            Gemm g = new()
            {
                ARow = _stride,
                AStep = 1,
                BStep = (nint)kv.ValueColumns * sizeof(float),
                BPanel = F32Panel.RowBytes,
                C = o,
                CRow = kv.ValueColumns,
            };
            for (int b = 0; b < blocks; b++)
            {
                for (int i = 0; i < rows; i++)
                {
                    counts[i] = AttentionTiles.CountInBlock(contexts[i], b);
                }

                g.A = scores + (b * AttentionTiles.Block);
                g.B = (byte*)kv.Values(head, b);
                g.Accumulate = b > 0;
                int panels = kv.ValueColumns / PanelPacking.Width;
                GemmBlocks.MultiplyRagged<F32Panel>(g, rows, panels, PanelPacking.Width, counts);
            }
        }

        private static int QueryHead(in Segment segment, int head, int row) => (head * segment.Group) + (row % segment.Group);

        private static long Offset(in Segment segment, int head, int row, int headDim) =>
            ((long)(row / segment.Group) * segment.Columns) + ((long)QueryHead(segment, head, row) * headDim);

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static float SumOfExponentials(float* row, float max, int n) =>
            VectorMath.Sum(new ShiftedExponentials(row, max), n);
    }
}
