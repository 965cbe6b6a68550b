using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>The low-rank bypass over segments of rows with different adapters, forward and backward.</summary>
internal static unsafe class LoraOps
{
    // Most rows of one piece of a segment: what a thread takes at once while it computes u.
    private const int RowsPerPiece = 24;
    private const int PanelsPerItem = 8;

    public static void Forward(CpuContext cpu, TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y)
    {
        Check.That(x.Rows == y.Rows);
        (int count, long lowRankFloats, long work) = Measure(x, segments, y);
        if (count == 0)
        {
            return;
        }

        Piece* pieces = (Piece*)cpu.Workspace.Bytes(WorkspaceSlot.LoraPieces, PieceBytes(count));
        float* u = cpu.Workspace.Floats(WorkspaceSlot.LowRank, lowRankFloats);
        int index = 0;
        foreach (LoraSegment segment in segments)
        {
            CpuFactor a = (CpuFactor)segment.A;
            float* expand = ((CpuFactor)segment.BTransposed).Data;
            for (int row = 0; row < segment.RowCount; row += RowsPerPiece)
            {
                int rows = Math.Min(RowsPerPiece, segment.RowCount - row);
                long first = segment.RowStart + row;
                pieces[index++] = new Piece(
                    CpuTensor.Of(x) + (first * x.Columns), rows, a.Panels, segment.Scale, u, expand,
                    CpuTensor.Of(y) + (first * y.Columns));
                u += (long)rows * a.InnerPadded;
            }
        }

        int items = (PanelPacking.Count(y.Columns) + PanelsPerItem - 1) / PanelsPerItem;
        cpu.Team.Run(new ProjectJob(pieces), count, work);
        cpu.Team.Run(new ExpandJob(pieces, count, y.Columns), items, work);
    }

    public static void Backward(
        CpuContext cpu, TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx)
    {
        int rank = a.Inner;
        Check.That(x.Rows == dy.Rows && bTransposed.Inner == rank);
        Check.That(x.Columns == a.Wide && dy.Columns == bTransposed.Wide);
        Check.That(gradA.Rows == rank && gradA.Columns == a.Wide);
        Check.That(gradBTransposed.Rows == rank && gradBTransposed.Columns == bTransposed.Wide);
        Check.That(dx is null || (dx.Value.Rows == x.Rows && dx.Value.Columns == x.Columns));
        int rows = x.Rows;
        if (rows == 0)
        {
            return;
        }

        CpuFactor narrowX = (CpuFactor)a;
        CpuFactor narrowDy = (CpuFactor)bTransposed;
        int padded = narrowX.InnerPadded;
        int perSide = (rows + RowsPerPiece - 1) / RowsPerPiece;
        Piece* pieces = (Piece*)cpu.Workspace.Bytes(WorkspaceSlot.LoraPieces, PieceBytes(2 * perSide));
        long lowRankFloats = LowRankFloats(rows, narrowX.Inner);
        float* u = cpu.Workspace.Floats(WorkspaceSlot.LowRank, 2 * lowRankFloats);
        float* du = u + lowRankFloats;
        for (int i = 0; i < perSide; i++)
        {
            long row = (long)i * RowsPerPiece;
            int count = (int)Math.Min(RowsPerPiece, rows - row);
            pieces[i] = new Piece(
                CpuTensor.Of(x) + (row * x.Columns), count, narrowX.Panels, scale, u + (row * padded), null, null);
            pieces[perSide + i] = new Piece(
                CpuTensor.Of(dy) + (row * dy.Columns), count, narrowDy.Panels, scale, du + (row * padded), null, null);
        }

        long work = (long)rows * (x.Columns + dy.Columns) * rank;
        cpu.Team.Run(new ProjectJob(pieces), 2 * perSide, work);
        GradientJob gradients = new(
            narrowX, dy.Columns, rows, u, du, CpuTensor.Of(x), CpuTensor.Of(dy), CpuTensor.Of(gradA),
            CpuTensor.Of(gradBTransposed), dx is null ? null : CpuTensor.Of(dx.Value));
        cpu.Team.Run(gradients, gradients.Items, work);
    }

    /// <summary>Most pieces that rows in so many segments are cut into.</summary>
    public static int PiecesMax(int rows, int segments) => (rows / RowsPerPiece) + segments;

    /// <summary>Bytes of what workers read about so many pieces.</summary>
    public static long PieceBytes(int pieces) => (long)pieces * sizeof(Piece);

    /// <summary>Floats of x A^T for so many rows.</summary>
    public static long LowRankFloats(int rows, int rank) => (long)rows * PanelPacking.Count(rank) * PanelPacking.Width;

    private static (int Pieces, long LowRankFloats, long Work) Measure(
        TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y)
    {
        int count = 0;
        int end = 0;
        long floats = 0;
        long work = 0;
        foreach (LoraSegment segment in segments)
        {
            Check.That(segment.RowStart >= end && segment.RowCount >= 0);
            Check.That(segment.A.Wide == x.Columns && segment.BTransposed.Wide == y.Columns);
            Check.That(segment.A.Inner == segment.BTransposed.Inner);
            end = segment.RowStart + segment.RowCount;
            count += (segment.RowCount + RowsPerPiece - 1) / RowsPerPiece;
            floats += LowRankFloats(segment.RowCount, segment.A.Inner);
            work += (long)segment.RowCount * segment.A.Inner * Math.Min(x.Columns, y.Columns);
        }

        Check.That(end <= x.Rows);
        return (count, floats, work);
    }

    // Rows of x, the panels they meet, and where scale * (x panels) goes; then what expands it, and into which rows.
    private readonly struct Piece(
        float* x, int rows, CpuWeight panels, float scale, float* lowRank, float* expand, float* y)
    {
        public readonly float* X = x;
        public readonly byte* Panels = panels.Data;
        public readonly nint PanelBytes = (nint)panels.PanelBytes;
        public readonly float* LowRank = lowRank;
        public readonly float* Expand = expand;
        public readonly float* Y = y;
        public readonly int Rows = rows;
        public readonly int PanelCount = panels.Panels;
        public readonly int Columns = panels.InFeatures;
        public readonly int Rank = panels.OutFeatures;
        public readonly float Scale = scale;
    }

    // One item: one piece. lowRank = scale * (x A^T).
    private readonly struct ProjectJob(Piece* pieces) : IParallelJob
    {
        private readonly Piece* _pieces = pieces;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            Piece piece = _pieces[item];
            int padded = piece.PanelCount * PanelPacking.Width;
            Gemm g = new()
            {
                A = piece.X,
                ARow = piece.Columns,
                AStep = 1,
                B = piece.Panels,
                BStep = F32Panel.RowBytes,
                BPanel = piece.PanelBytes,
                C = piece.LowRank,
                CRow = padded,
                K = piece.Columns,
            };
            GemmBlocks.Multiply<F32Panel>(g, piece.Rows, piece.PanelCount, PanelPacking.Width);
            Vector256<float> scale = Vector256.Create(piece.Scale);
            for (int i = 0; i < piece.Rows * padded; i += VectorMath.Lanes)
            {
                (Vector256.Load(piece.LowRank + i) * scale).Store(piece.LowRank + i);
            }
        }
    }

    // One item: a range of output columns of every piece. y += lowRank B^T.
    private readonly struct ExpandJob(Piece* pieces, int count, int columns) : IParallelJob
    {
        private readonly Piece* _pieces = pieces;
        private readonly int _count = count;
        private readonly int _columns = columns;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            for (int i = 0; i < _count; i++)
            {
                Piece piece = _pieces[i];
                Gemm g = new()
                {
                    A = piece.LowRank,
                    ARow = piece.PanelCount * PanelPacking.Width,
                    AStep = 1,
                    B = (byte*)piece.Expand,
                    BStep = (nint)_columns * sizeof(float),
                    C = piece.Y,
                    CRow = _columns,
                    K = piece.Rank,
                    Accumulate = true,
                };
                ColumnRange(g, piece.Rows, item, _columns);
            }
        }
    }

    // Columns of item in a row-major B and C.
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void ColumnRange(Gemm g, int rows, int item, int allColumns)
    {
        int column = item * PanelsPerItem * PanelPacking.Width;
        int columns = Math.Min(PanelsPerItem * PanelPacking.Width, allColumns - column);
        g.B += (long)column * sizeof(float);
        g.BPanel = PanelPacking.Width * sizeof(float);
        g.C += column;
        GemmBlocks.Multiply<F32Panel>(g, rows, PanelPacking.Count(columns), PanelPacking.LastColumns(columns));
    }

    // Items: ranges of input columns (gradA, dx), then ranges of output columns (gradBTransposed). Both u and du hold the scale.
    private readonly struct GradientJob(
        CpuFactor a, int outFeatures, int rows, float* u, float* du, float* x, float* dy, float* gradA, float* gradB, float* dx)
        : IParallelJob
    {
        private readonly float* _a = a.Data;
        private readonly float* _u = u;
        private readonly float* _du = du;
        private readonly float* _x = x;
        private readonly float* _dy = dy;
        private readonly float* _gradA = gradA;
        private readonly float* _gradB = gradB;
        private readonly float* _dx = dx;
        private readonly int _rows = rows;
        private readonly int _rank = a.Inner;
        private readonly int _rankPadded = a.InnerPadded;
        private readonly int _in = a.Wide;
        private readonly int _out = outFeatures;

        public int Items => InputItems + ((PanelPacking.Count(_out) + PanelsPerItem - 1) / PanelsPerItem);

        private int InputItems => (PanelPacking.Count(_in) + PanelsPerItem - 1) / PanelsPerItem;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            if (item >= InputItems)
            {
                AddOuterProducts(_u, _dy, _out, _gradB, item - InputItems);
                return;
            }

            AddOuterProducts(_du, _x, _in, _gradA, item);
            if (_dx != null)
            {
                Gemm g = new()
                {
                    A = _du,
                    ARow = _rankPadded,
                    AStep = 1,
                    B = (byte*)_a,
                    BStep = (nint)_in * sizeof(float),
                    C = _dx,
                    CRow = _in,
                    K = _rank,
                    Accumulate = true,
                };
                ColumnRange(g, _rows, item, _in);
            }
        }

        // gradient[r, c] += sum over rows t, descending, of lowRank[t, r] * right[t, c].
        private void AddOuterProducts(float* lowRank, float* right, int columns, float* gradient, int item)
        {
            Gemm g = new()
            {
                A = lowRank + ((long)(_rows - 1) * _rankPadded),
                ARow = 1,
                AStep = -_rankPadded,
                B = (byte*)(right + ((long)(_rows - 1) * columns)),
                BStep = -(nint)columns * sizeof(float),
                C = gradient,
                CRow = columns,
                K = _rows,
                Accumulate = true,
            };
            ColumnRange(g, _rank, item, columns);
        }
    }
}
