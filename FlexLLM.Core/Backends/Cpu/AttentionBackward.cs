using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>
/// Gradient of attention for one window. Rows p are ordered by descending position, then ascending query head of the group:
/// sums over rows run in that order, so that windows and chunks taken from the end continue each other's sums.
/// </summary>
internal static unsafe class AttentionBackward
{
    private const int RowsPerTile = 24;

    // Rows whose probabilities and score gradients are in memory at once, unless one position has more query heads.
    private const int RowsPerChunk = 96;

    public static void Run(
        CpuContext cpu, TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK,
        DeviceTensor dV)
    {
        if (window.RowCount == 0)
        {
            return;
        }

        Window whole = new(cpu, q, dO, layer, window, dQ, dK, dV);
        int end = window.PositionStart + window.RowCount;
        int positionsPerChunk = PositionsPerChunk(whole.Group);
        int blocks = PanelPacking.Count(end);
        Buffers buffers = new(cpu, whole, end, window.RowCount);
        long blockWork = (long)AttentionTiles.Block * whole.Kv.ValueColumns;
        for (int head = 0; head < whole.KvHeads; head++)
        {
            cpu.Team.Run(new HeadJob(whole, buffers, head), blocks, blocks * blockWork);
            for (int last = end - 1; last >= window.PositionStart; last -= positionsPerChunk)
            {
                int first = Math.Max(window.PositionStart, last - positionsPerChunk + 1);
                Chunk chunk = new(head, first, last, (last - first + 1) * whole.Group);
                int chunkBlocks = PanelPacking.Count(last + 1);
                long work = chunk.Rows * blockWork * chunkBlocks * 2;
                cpu.Team.Run(new RowJob(whole, buffers, chunk), (chunk.Rows + RowsPerTile - 1) / RowsPerTile, work);
                cpu.Team.Run(new ColumnJob(whole, buffers, chunk), chunkBlocks, work);
            }
        }
    }

    /// <summary>Floats of one head's keys and values, turned over, for so many positions.</summary>
    public static long HeadFloats(int context, int valueColumns) =>
        2L * PanelPacking.Count(context) * AttentionTiles.Block * valueColumns;

    /// <summary>Floats of a chunk of a window's rows: queries, output gradients, probabilities, score gradients.</summary>
    public static long ChunkFloats(int windowRows, int group, int context, int valueColumns) =>
        2L * ChunkRows(windowRows, group) * (valueColumns + AttentionTiles.ScoreStride(context));

    /// <summary>Floats of the query gradients that a thread has in work.</summary>
    public static long TileFloats(int valueColumns) => (long)RowsPerTile * valueColumns;

    private static int PositionsPerChunk(int group) => Math.Max(1, RowsPerChunk / group);

    private static int ChunkRows(int windowRows, int group) => Math.Min(PositionsPerChunk(group), windowRows) * group;

    private readonly struct Window
    {
        public readonly KvView Kv;
        public readonly float* Q;
        public readonly float* DO;
        public readonly float* DQ;
        public readonly float* DK;
        public readonly float* DV;
        public readonly float* LogSumExp;
        public readonly int PositionStart;
        public readonly int QueryHeads;
        public readonly int KvHeads;
        public readonly int Group;

        public Window(
            CpuContext cpu, TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK,
            DeviceTensor dV)
        {
            CpuKvCache cache = (CpuKvCache)window.Cache;
            int end = window.PositionStart + window.RowCount;
            KvHeads = cache.KvHeads;
            QueryHeads = q.Columns / cache.HeadDim;
            Group = QueryHeads / KvHeads;
            Check.That(Group > 0 && Group * KvHeads * cache.HeadDim == q.Columns);
            Check.That(q.Rows == window.RowCount && dO.Rows == q.Rows && dQ.Rows == q.Rows);
            Check.That(dO.Columns == q.Columns && dQ.Columns == q.Columns);
            Check.That(dK.Rows >= end && dK.Columns == KvHeads * cache.HeadDim);
            Check.That(dV.Rows >= end && dV.Columns == dK.Columns);
            Check.That(window.LogSumExp is not null);
            Check.That(window.LogSumExp.Rows >= end && window.LogSumExp.Columns == QueryHeads);
            Kv = new KvView(cache, AttentionForward.PlaceBlocks(cpu, layer, [window]));
            PositionStart = window.PositionStart;
            Q = CpuTensor.Of(q);
            DO = CpuTensor.Of(dO);
            DQ = CpuTensor.Of(dQ);
            DK = CpuTensor.Of(dK);
            DV = CpuTensor.Of(dV);
            LogSumExp = CpuTensor.Of(window.LogSumExp);
        }
    }

    // ValuesTransposed [block][ValueColumns][16] and Keys [position][ValueColumns] of the head in work; per row of the chunk the
    // scaled query, dO, probabilities and score gradients; per thread the dQ of a tile.
    private readonly struct Buffers
    {
        public readonly float* ValuesTransposed;
        public readonly float* Keys;
        public readonly float* Q;
        public readonly float* DO;
        public readonly float* P;
        public readonly float* DS;
        public readonly float* DQ;
        public readonly int Stride;

        public Buffers(CpuContext cpu, in Window window, int context, int windowRows)
        {
            int valueColumns = window.Kv.ValueColumns;
            long headFloats = HeadFloats(context, valueColumns);
            ValuesTransposed = cpu.Workspace.Floats(WorkspaceSlot.AttentionHead, headFloats);
            Keys = ValuesTransposed + (headFloats / 2);
            Stride = AttentionTiles.ScoreStride(context);
            long chunkRows = ChunkRows(windowRows, window.Group);
            Q = cpu.Workspace.Floats(
                WorkspaceSlot.AttentionChunk, ChunkFloats(windowRows, window.Group, context, valueColumns));
            DO = Q + (chunkRows * valueColumns);
            P = DO + (chunkRows * valueColumns);
            DS = P + (chunkRows * Stride);
            DQ = cpu.Workspace.Floats(WorkspaceSlot.AttentionScratch, TileFloats(valueColumns) * cpu.Team.Threads);
        }
    }

    // Positions [First, Last] of one KV head's rows.
    private readonly record struct Chunk(int Head, int First, int Last, int Rows);

    // One item: one block. Turns values and keys over, because here scores and outputs change places.
    private readonly struct HeadJob(Window window, Buffers buffers, int head) : IParallelJob
    {
        private readonly Window _window = window;
        private readonly Buffers _buffers = buffers;
        private readonly int _head = head;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            ref readonly KvView kv = ref _window.Kv;
            int columns = kv.ValueColumns;
            float* keys = _buffers.Keys + ((long)item * AttentionTiles.Block * columns);
            float* values = _buffers.ValuesTransposed + ((long)item * AttentionTiles.Block * columns);
            for (int d = 0; d < columns; d += PanelPacking.Width)
            {
                float* keyTile = kv.Keys(_head, item) + (d * AttentionTiles.Block);
                Transpose.Tile(keyTile, AttentionTiles.Block, kv.HeadDim - d, keys + d, columns);
                Transpose.Tile(
                    kv.Values(_head, item) + d, columns, AttentionTiles.Block, values + (d * AttentionTiles.Block), AttentionTiles.Block);
            }
        }
    }

    // One item: a tile of rows. P, dS and dQ of its rows.
    private readonly struct RowJob(Window window, Buffers buffers, Chunk chunk) : IParallelJob
    {
        private readonly Window _window = window;
        private readonly Buffers _buffers = buffers;
        private readonly Chunk _chunk = chunk;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            ref readonly KvView kv = ref _window.Kv;
            int first = item * RowsPerTile;
            int rows = Math.Min(RowsPerTile, _chunk.Rows - first);
            float* q = _buffers.Q + ((long)first * kv.ValueColumns);
            float* dO = _buffers.DO + ((long)first * kv.ValueColumns);
            float* p = _buffers.P + ((long)first * _buffers.Stride);
            float* dS = _buffers.DS + ((long)first * _buffers.Stride);
            float scale = AttentionTiles.ScoreScale(kv.HeadDim);
            int* contexts = stackalloc int[RowsPerTile];
            for (int i = 0; i < rows; i++)
            {
                contexts[i] = Position(first + i) + 1;
                long offset = Offset(first + i);
                AttentionTiles.Scale(_window.Q + offset, scale, q + (i * kv.ValueColumns), kv.HeadDim);
                AttentionTiles.Scale(_window.DO + offset, 1f, dO + (i * kv.ValueColumns), kv.HeadDim);
            }

            int blocks = PanelPacking.Count(contexts[0]);
            AttentionTiles.Scores(kv, _chunk.Head, q, rows, blocks, p, _buffers.Stride);
            MultiplyByValues(dO, rows, blocks, dS);
            for (int i = 0; i < rows; i++)
            {
                long place = ((contexts[i] - 1L) * _window.QueryHeads) + QueryHead(first + i);
                long row = i * (long)_buffers.Stride;
                ScoreGradients(p + row, dS + row, _window.LogSumExp[place], contexts[i]);
            }

            float* dQ = _buffers.DQ + ((long)worker * RowsPerTile * kv.ValueColumns);
            MultiplyByKeys(dS, rows, contexts, dQ);
            for (int i = 0; i < rows; i++)
            {
                AttentionTiles.Scale(dQ + (i * kv.ValueColumns), scale, _window.DQ + Offset(first + i), kv.HeadDim);
            }
        }

        private int Position(int row) => _chunk.Last - (row / _window.Group);

        private int QueryHead(int row) => (_chunk.Head * _window.Group) + (row % _window.Group);

        private long Offset(int row)
        {
            long windowRow = Position(row) - _window.PositionStart;
            return ((windowRow * _window.QueryHeads) + QueryHead(row)) * _window.Kv.HeadDim;
        }

        // dP = dO V^T
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void MultiplyByValues(float* dO, int rows, int blocks, float* dP)
        {
            Gemm g = new()
            {
                A = dO,
                ARow = _window.Kv.ValueColumns,
                AStep = 1,
                B = (byte*)_buffers.ValuesTransposed,
                BStep = F32Panel.RowBytes,
                BPanel = (nint)_window.Kv.ValueColumns * F32Panel.RowBytes,
                C = dP,
                CRow = _buffers.Stride,
                K = _window.Kv.HeadDim,
            };
            GemmBlocks.Multiply<F32Panel>(g, rows, blocks, PanelPacking.Width);
        }

        // dQ = dS K, each row over its own context.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void MultiplyByKeys(float* dS, int rows, int* contexts, float* dQ)
        {
            Gemm g = new()
            {
                A = dS,
                ARow = _buffers.Stride,
                AStep = 1,
                B = (byte*)_buffers.Keys,
                BStep = (nint)_window.Kv.ValueColumns * sizeof(float),
                BPanel = F32Panel.RowBytes,
                C = dQ,
                CRow = _window.Kv.ValueColumns,
            };
            int panels = _window.Kv.ValueColumns / PanelPacking.Width;
            GemmBlocks.MultiplyRagged<F32Panel>(g, rows, panels, PanelPacking.Width, contexts);
        }

        // P = exp(S - lse) in place of S; dS = P * (dP - sum(P * dP)) in place of dP.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private static void ScoreGradients(float* p, float* dS, float logSumExp, int n)
        {
            VectorMath.Sum(new ShiftedExponentials(p, logSumExp), n);
            Vector256<float> mean = Vector256.Create(VectorMath.Sum(new DotProduct(p, dS), n));
            for (int c = 0; c < n; c += VectorMath.Lanes)
            {
                (Vector256.Load(p + c) * (Vector256.Load(dS + c) - mean)).Store(dS + c);
            }
        }
    }

    // One item: 16 positions j. dV[j] += P^T dO and dK[j] += dS^T Q over the chunk's rows that attend j.
    private readonly struct ColumnJob(Window window, Buffers buffers, Chunk chunk) : IParallelJob
    {
        private readonly Window _window = window;
        private readonly Buffers _buffers = buffers;
        private readonly Chunk _chunk = chunk;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int first = item * AttentionTiles.Block;
            int columns = Math.Min(AttentionTiles.Block, _chunk.Last + 1 - first);
            int* counts = stackalloc int[AttentionTiles.Block];
            for (int j = 0; j < columns; j++)
            {
                counts[j] = Math.Min(_chunk.Rows, (_chunk.Last - (first + j) + 1) * _window.Group);
            }

            AddProducts(_buffers.P + first, _buffers.DO, _window.DV, first, columns, counts);
            AddProducts(_buffers.DS + first, _buffers.Q, _window.DK, first, columns, counts);
        }

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void AddProducts(float* left, float* right, float* accumulator, int first, int columns, int* counts)
        {
            int headDim = _window.Kv.HeadDim;
            long row = (long)_window.KvHeads * headDim;
            Gemm g = new()
            {
                A = left,
                ARow = 1,
                AStep = _buffers.Stride,
                B = (byte*)right,
                BStep = (nint)_window.Kv.ValueColumns * sizeof(float),
                BPanel = F32Panel.RowBytes,
                C = accumulator + (first * row) + ((long)_chunk.Head * headDim),
                CRow = (nint)row,
                Accumulate = true,
            };
            int panels = PanelPacking.Count(headDim);
            GemmBlocks.MultiplyRagged<F32Panel>(g, columns, panels, PanelPacking.LastColumns(headDim), counts);
        }
    }
}
