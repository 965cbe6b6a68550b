using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>
/// The three products of a bypass matrix M [inner, wide]. Composed as LoRA they give the bits of <see cref="LoraOps"/>: the
/// same chains of multiply-adds, scaled at the same places.
/// </summary>
internal static unsafe class FactorOps
{
    // What a thread narrows at once: rows of x, panels of M, and the part of the reduction that stays in the first-level cache.
    private const int RowsPerNarrow = 24;
    private const int PanelsPerNarrow = 4;
    private const int ReductionPerPass = 512;

    // Rows of u whose scaled copy is made at once, and columns of M or of the gradient beside each other.
    private const int RowsPerBlock = 96;
    private const int PanelsPerItem = 8;
    private const int ColumnsPerItem = PanelsPerItem * PanelPacking.Width;

    // Rows of a destination that are finished before the next ones begin. Rows whose length is a power of two push each other
    // out of the cache: so many of them keep their place.
    private const int RowsPerTurn = 12;

    // From here on it pays to lay the columns of M in work densely, for the same reason.
    private const int RowsForDenseTile = 16;
    private const int InnerForDenseTile = 24;

    private const long NarrowFloats = RowsPerNarrow * PanelsPerNarrow * PanelPacking.Width;

    /// <summary>Scratch floats of a thread for matrices of this inner side.</summary>
    public static long ScratchFloats(int inner) => Math.Max(NarrowFloats, ScaledFloats(inner));

    public static void Narrow(CpuContext cpu, TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate)
    {
        Check.That(x.Rows == u.Rows);
        Check.That(x.Columns == m.Wide && u.Columns == m.Inner);
        CpuFactor factor = (CpuFactor)m;
        long scratchFloats = NarrowFloats;
        float* scratch = cpu.Workspace.Floats(WorkspaceSlot.FactorRows, scratchFloats * cpu.Team.Threads);
        int groups = (factor.Panels.Panels + PanelsPerNarrow - 1) / PanelsPerNarrow;
        int items = groups * ((x.Rows + RowsPerNarrow - 1) / RowsPerNarrow);
        NarrowJob job = new(factor, CpuTensor.Of(x), x.Rows, scale, CpuTensor.Of(u), accumulate, groups, scratch, scratchFloats);
        cpu.Team.Run(job, items, (long)x.Rows * m.Wide * m.Inner);
    }

    public static void Widen(CpuContext cpu, TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate)
    {
        Check.That(u.Rows == y.Rows);
        Check.That(u.Columns == m.Inner && y.Columns == m.Wide);
        ScaledRows rows = new(cpu, u, scale);
        int ranges = RangesOf(m.Wide);
        int items = ranges * ((u.Rows + RowsPerBlock - 1) / RowsPerBlock);
        float* tiles = cpu.Workspace.Floats(WorkspaceSlot.FactorTiles, cpu.Team.Threads * TileFloats(m.Inner));
        WidenJob job = new(rows, ((CpuFactor)m).Data, m.Wide, tiles, CpuTensor.Of(y), accumulate, ranges);
        cpu.Team.Run(job, items, (long)u.Rows * m.Wide * m.Inner);
    }

    public static void AddOuter(CpuContext cpu, TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient)
    {
        Check.That(u.Rows == x.Rows);
        Check.That(gradient.Rows == u.Columns && gradient.Columns == x.Columns);
        ScaledRows rows = new(cpu, u, scale);
        OuterJob job = new(rows, CpuTensor.Of(x), x.Columns, CpuTensor.Of(gradient));
        cpu.Team.Run(job, u.Rows == 0 ? 0 : RangesOf(x.Columns), (long)u.Rows * u.Columns * x.Columns);
    }

    /// <summary>Scratch floats of a thread for columns of a matrix laid densely.</summary>
    public static long TileFloats(int inner) => (long)inner * ColumnsPerItem;

    private static long ScaledFloats(int inner) => (long)RowsPerBlock * inner;

    private static int RangesOf(int columns) => (columns + ColumnsPerItem - 1) / ColumnsPerItem;

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void MultiplyInTurns(Gemm g, int rows, int columns)
    {
        int panels = PanelPacking.Count(columns);
        int lastColumns = PanelPacking.LastColumns(columns);
        for (int row = 0; row < rows; row += RowsPerTurn)
        {
            GemmBlocks.Multiply<F32Panel>(g, Math.Min(RowsPerTurn, rows - row), panels, lastColumns);
            g.A += RowsPerTurn * g.ARow;
            g.C += RowsPerTurn * g.CRow;
        }
    }

    // Rows of u times scale, a block at a time, in the scratch of the thread that asks.
    private readonly struct ScaledRows(CpuContext cpu, TensorSlice u, float scale)
    {
        public readonly int Rows = u.Rows;
        public readonly int Inner = u.Columns;
        private readonly float* _u = CpuTensor.Of(u);
        private readonly float* _scratch =
            cpu.Workspace.Floats(WorkspaceSlot.FactorRows, cpu.Team.Threads * ScaledFloats(u.Columns));
        private readonly float _scale = scale;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public float* Block(int row, int rows, int worker)
        {
            float* source = _u + ((long)row * Inner);
            if (_scale == 1f)
            {
                return source;
            }

            float* block = _scratch + ((long)worker * RowsPerBlock * Inner);
            long count = (long)rows * Inner;
            Vector256<float> scale = Vector256.Create(_scale);
            for (long i = 0; i < count; i += VectorMath.Lanes)
            {
                VectorMath.Store(Vector256.Load(source + i) * scale, block + i, count - i);
            }

            return block;
        }
    }

    // One item: some rows times some panels.
    private readonly struct NarrowJob(
        CpuFactor factor, float* x, int rows, float scale, float* u, bool accumulate, int groups, float* scratch,
        long scratchFloats) : IParallelJob
    {
        private readonly byte* _panels = factor.Panels.Data;
        private readonly nint _panelBytes = (nint)factor.Panels.PanelBytes;
        private readonly int _panelCount = factor.Panels.Panels;
        private readonly int _inner = factor.Inner;
        private readonly int _wide = factor.Wide;
        private readonly float* _x = x;
        private readonly float* _u = u;
        private readonly float* _scratch = scratch;
        private readonly long _scratchFloats = scratchFloats;
        private readonly int _rows = rows;
        private readonly int _groups = groups;
        private readonly float _scale = scale;
        private readonly bool _accumulate = accumulate;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int panel = item % _groups * PanelsPerNarrow;
            int panels = Math.Min(PanelsPerNarrow, _panelCount - panel);
            int row = item / _groups * RowsPerNarrow;
            int rows = Math.Min(RowsPerNarrow, _rows - row);
            int padded = panels * PanelPacking.Width;
            float* sums = _scratch + (worker * _scratchFloats);
            int pass = rows <= 6 ? _wide : ReductionPerPass;
            for (int start = 0; start < _wide; start += pass)
            {
                Gemm g = new()
                {
                    A = _x + ((long)row * _wide) + start,
                    ARow = _wide,
                    AStep = 1,
                    B = _panels + (panel * _panelBytes) + ((long)start * F32Panel.RowBytes),
                    BStep = F32Panel.RowBytes,
                    BPanel = _panelBytes,
                    C = sums,
                    CRow = padded,
                    K = Math.Min(pass, _wide - start),
                    Accumulate = start > 0,
                };
                GemmBlocks.Multiply<F32Panel>(g, rows, panels, PanelPacking.Width);
            }

            int column = panel * PanelPacking.Width;
            int columns = Math.Min(padded, _inner - column);
            Vector256<float> scale = Vector256.Create(_scale);
            for (int i = 0; i < rows; i++)
            {
                float* u = _u + ((long)(row + i) * _inner) + column;
                for (int c = 0; c < columns; c += VectorMath.Lanes)
                {
                    Vector256<float> sum = Vector256.Load(sums + (i * padded) + c) * scale;
                    VectorMath.Store(_accumulate ? Vector256.Load(u + c) + sum : sum, u + c, columns - c);
                }
            }
        }
    }

    // One item: some rows, a range of columns.
    private readonly struct WidenJob(ScaledRows u, float* m, int wide, float* tiles, float* y, bool accumulate, int ranges)
        : IParallelJob
    {
        private readonly ScaledRows _u = u;
        private readonly float* _m = m;
        private readonly float* _tiles = tiles;
        private readonly float* _y = y;
        private readonly int _wide = wide;
        private readonly int _ranges = ranges;
        private readonly bool _accumulate = accumulate;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int row = item / _ranges * RowsPerBlock;
            int rows = Math.Min(RowsPerBlock, _u.Rows - row);
            int column = item % _ranges * ColumnsPerItem;
            int columns = Math.Min(ColumnsPerItem, _wide - column);
            Gemm g = new()
            {
                A = _u.Block(row, rows, worker),
                ARow = _u.Inner,
                AStep = 1,
                B = (byte*)(_m + column),
                BStep = (nint)_wide * sizeof(float),
                BPanel = F32Panel.RowBytes,
                C = _y + ((long)row * _wide) + column,
                CRow = _wide,
                K = _u.Inner,
                Accumulate = _accumulate,
            };
            if (rows >= RowsForDenseTile && _u.Inner >= InnerForDenseTile)
            {
                float* tile = _tiles + ((long)worker * _u.Inner * ColumnsPerItem);
                LayDensely(_m + column, PanelPacking.Count(columns), tile);
                g.B = (byte*)tile;
                g.BStep = F32Panel.RowBytes;
                g.BPanel = (nint)_u.Inner * F32Panel.RowBytes;
            }

            MultiplyInTurns(g, rows, columns);
        }

        // tile[j][i][16] = m[i, 16 j ..]; behind the last column of M whatever follows it.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void LayDensely(float* m, int panels, float* tile)
        {
            for (int j = 0; j < panels; j++)
            {
                float* source = m + (j * PanelPacking.Width);
                for (int i = 0; i < _u.Inner; i++)
                {
                    Vector256.Load(source).Store(tile);
                    Vector256.Load(source + VectorMath.Lanes).Store(tile + VectorMath.Lanes);
                    source += _wide;
                    tile += PanelPacking.Width;
                }
            }
        }
    }

    // One item: a range of columns of the gradient. Blocks of rows come from the end, rows inside them too.
    private readonly struct OuterJob(ScaledRows u, float* x, int wide, float* gradient) : IParallelJob
    {
        private readonly ScaledRows _u = u;
        private readonly float* _x = x;
        private readonly float* _gradient = gradient;
        private readonly int _wide = wide;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int column = item * ColumnsPerItem;
            int columns = Math.Min(ColumnsPerItem, _wide - column);
            for (int end = _u.Rows; end > 0; end -= RowsPerBlock)
            {
                int rows = Math.Min(RowsPerBlock, end);
                Gemm g = new()
                {
                    A = _u.Block(end - rows, rows, worker) + ((long)(rows - 1) * _u.Inner),
                    ARow = 1,
                    AStep = -_u.Inner,
                    B = (byte*)(_x + ((long)(end - 1) * _wide) + column),
                    BStep = -(nint)_wide * sizeof(float),
                    BPanel = F32Panel.RowBytes,
                    C = _gradient + column,
                    CRow = _wide,
                    K = rows,
                    Accumulate = true,
                };
                MultiplyInTurns(g, _u.Inner, columns);
            }
        }
    }
}
