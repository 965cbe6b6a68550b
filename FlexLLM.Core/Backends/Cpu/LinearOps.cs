using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>Products with packed weights, and rows read out of them.</summary>
internal static unsafe class LinearOps
{
    // Rows whose slice of x stays in the second-level cache together with the panels in work; a multiple of the tile height.
    private const int RowsPerChunk = 96;

    // Part of the reduction whose panel stays in the first-level cache while rows pass.
    private const int ReductionPerPass = 512;

    // Up to here a call is bound by reading weights: few panels at a time, each read once.
    private const int RowsStreaming = 16;
    private const int PanelsPerItemStreaming = 4;
    private const int PanelsPerItem = 16;

    private const int RowsPerBackwardChunk = 24;

    // Panels that are summed over in lanes before these are joined: joining costs as much as two panels.
    private const int PanelsPerSum = 16;

    // Most input columns of an item: with the panels of a sum they stay in the second-level cache. Columns of a tile.
    private const int InputsPerItem = 256;
    private const int InputsPerTile = 4;

    public static void Forward(
        CpuContext cpu, TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate)
    {
        Check.That(x.Rows == y.Rows);
        Check.That(y.Columns == weight.OutFeatures);
        Check.That(bias is null || (bias.Rows == 1 && bias.Columns == y.Columns));
        Forward(
            cpu, CpuTensor.Of(x), x.Rows, x.Columns, (CpuWeight)weight, bias is null ? null : ((CpuTensor)bias).Data,
            CpuTensor.Of(y), accumulate);
    }

    public static void Forward(
        CpuContext cpu, float* x, int rows, int columns, CpuWeight weight, float* bias, float* y, bool accumulate)
    {
        Check.That(columns == weight.InFeatures);
        if (rows == 0)
        {
            return;
        }

        Shape shape = new(weight, rows);
        int perItem = rows <= RowsStreaming ? PanelsPerItemStreaming : PanelsPerItem;
        perItem = Math.Min(perItem, Math.Max(PanelsPerItemStreaming, weight.Panels / (4 * cpu.Team.Threads)));
        int items = (weight.Panels + perItem - 1) / perItem;
        long work = (long)rows * weight.InFeatures * weight.OutFeatures;
        if (weight.Type == DType.BF16)
        {
            cpu.Team.Run(new ForwardJob<BF16Panel>(shape, x, bias, y, accumulate, perItem), items, work);
        }
        else
        {
            cpu.Team.Run(new ForwardJob<F32Panel>(shape, x, bias, y, accumulate, perItem), items, work);
        }
    }

    public static void BackwardInput(CpuContext cpu, TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate)
    {
        Check.That(dy.Rows == dx.Rows);
        Check.That(dy.Columns == weight.OutFeatures);
        Check.That(dx.Columns == weight.InFeatures);
        BackwardInput(cpu, CpuTensor.Of(dy), dy.Rows, (CpuWeight)weight, CpuTensor.Of(dx), accumulate);
    }

    public static void BackwardInput(CpuContext cpu, float* dy, int rows, CpuWeight weight, float* dx, bool accumulate)
    {
        if (rows == 0)
        {
            return;
        }

        // As many items as make whole rounds of the team; whole tiles.
        int threads = cpu.Team.Threads;
        int rounds = (weight.InFeatures + (InputsPerItem * threads) - 1) / (InputsPerItem * threads);
        int perItem = (weight.InFeatures + (rounds * threads) - 1) / (rounds * threads);
        perItem = (perItem + InputsPerTile - 1) / InputsPerTile * InputsPerTile;
        int items = (weight.InFeatures + perItem - 1) / perItem;
        Shape shape = new(weight, rows);
        long work = (long)rows * weight.InFeatures * weight.OutFeatures;
        if (weight.Type == DType.BF16)
        {
            cpu.Team.Run(new BackwardJob<BF16Panel>(shape, dy, dx, accumulate, perItem), items, work);
        }
        else
        {
            cpu.Team.Run(new BackwardJob<F32Panel>(shape, dy, dx, accumulate, perItem), items, work);
        }
    }

    public static void Gather(CpuContext cpu, DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y)
    {
        Check.That(ids.Length == y.Rows);
        Check.That(y.Columns == table.InFeatures);
        foreach (int id in ids)
        {
            Check.That(id >= 0 && id < table.OutFeatures);
        }

        CpuWeight weight = (CpuWeight)table;
        fixed (int* first = ids)
        {
            long work = (long)ids.Length * y.Columns;
            if (table.Type == DType.BF16)
            {
                cpu.Team.Run(new GatherJob<BF16Panel>(new Shape(weight, 1), first, CpuTensor.Of(y)), ids.Length, work);
            }
            else
            {
                cpu.Team.Run(new GatherJob<F32Panel>(new Shape(weight, 1), first, CpuTensor.Of(y)), ids.Length, work);
            }
        }
    }

    private readonly struct Shape(CpuWeight weight, int rows)
    {
        public readonly byte* Panels = weight.Data;
        public readonly long PanelBytes = weight.PanelBytes;
        public readonly int PanelCount = weight.Panels;
        public readonly int Out = weight.OutFeatures;
        public readonly int In = weight.InFeatures;
        public readonly int Rows = rows;
    }

    // One item: all rows times perItem panels.
    private readonly struct ForwardJob<TPanel>(
        Shape shape, float* x, float* bias, float* y, bool accumulate, int perItem) : IParallelJob
        where TPanel : unmanaged, IPanel
    {
        private readonly Shape _shape = shape;
        private readonly float* _x = x;
        private readonly float* _bias = bias;
        private readonly float* _y = y;
        private readonly bool _accumulate = accumulate;
        private readonly int _perItem = perItem;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int panel = item * _perItem;
            int panels = Math.Min(_perItem, _shape.PanelCount - panel);
            int column = panel * PanelPacking.Width;
            int columns = Math.Min(panels * PanelPacking.Width, _shape.Out - column);
            for (int row = 0; row < _shape.Rows; row += RowsPerChunk)
            {
                int rows = Math.Min(RowsPerChunk, _shape.Rows - row);
                float* y = _y + ((long)row * _shape.Out) + column;
                if (_bias != null)
                {
                    StartWithBias(y, rows, column, columns);
                }

                // A panel that one tile row uses once gains nothing from being cut.
                int pass = rows <= 6 ? _shape.In : ReductionPerPass;
                for (int start = 0; start < _shape.In; start += pass)
                {
                    Gemm g = new()
                    {
                        A = _x + ((long)row * _shape.In) + start,
                        ARow = _shape.In,
                        AStep = 1,
                        B = _shape.Panels + (panel * _shape.PanelBytes) + ((long)start * TPanel.RowBytes),
                        BStep = TPanel.RowBytes,
                        BPanel = (nint)_shape.PanelBytes,
                        C = y,
                        CRow = _shape.Out,
                        K = Math.Min(pass, _shape.In - start),
                        Accumulate = start > 0 || _accumulate || _bias != null,
                    };
                    GemmBlocks.Multiply<TPanel>(g, rows, panels, columns - ((panels - 1) * PanelPacking.Width));
                }
            }
        }

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void StartWithBias(float* y, int rows, int column, int columns)
        {
            for (int i = 0; i < rows; i++)
            {
                for (int c = 0; c < columns; c += VectorMath.Lanes)
                {
                    float* p = y + ((long)i * _shape.Out) + c;
                    Vector256<float> b = Vector256.Load(_bias + column + c);
                    VectorMath.Store(_accumulate ? Vector256.Load(p) + b : b, p, columns - c);
                }
            }
        }
    }

    // One item: all rows of perItem columns of the input.
    private readonly struct BackwardJob<TPanel>(Shape shape, float* dy, float* dx, bool accumulate, int perItem) : IParallelJob
        where TPanel : unmanaged, IPanel
    {
        private readonly Shape _shape = shape;
        private readonly float* _dy = dy;
        private readonly float* _dx = dx;
        private readonly bool _accumulate = accumulate;
        private readonly int _perItem = perItem;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int column = item * _perItem;
            int columns = Math.Min(_perItem, _shape.In - column);
            int whole = _shape.Out / PanelPacking.Width;
            for (int panel = 0; panel < whole; panel += PanelsPerSum)
            {
                for (int row = 0; row < _shape.Rows; row += RowsPerBackwardChunk)
                {
                    float* dy = _dy + ((long)row * _shape.Out) + (panel * PanelPacking.Width);
                    TransposedGemm g = At(panel, Math.Min(PanelsPerSum, whole - panel), row, column, dy, _shape.Out);
                    g.Multiply<TPanel>(Math.Min(RowsPerBackwardChunk, _shape.Rows - row), columns);
                }
            }

            if (whole < _shape.PanelCount)
            {
                RunLastPanel(whole, column, columns);
            }
        }

        // What lies behind a row's last output is another row's, and no number times a padding zero need be zero.
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void RunLastPanel(int panel, int column, int columns)
        {
            int first = panel * PanelPacking.Width;
            float* padded = stackalloc float[PanelPacking.Width];
            Span<float> outputs = new(padded, PanelPacking.Width);
            outputs.Clear();
            for (int row = 0; row < _shape.Rows; row++)
            {
                new Span<float>(_dy + ((long)row * _shape.Out) + first, _shape.Out - first).CopyTo(outputs);
                At(panel, 1, row, column, padded, 0).Multiply<TPanel>(1, columns);
            }
        }

        private TransposedGemm At(int panel, int panels, int row, int column, float* dy, nint dyRow) => new()
        {
            A = dy,
            ARow = dyRow,
            B = _shape.Panels + (panel * _shape.PanelBytes) + ((long)column * TPanel.RowBytes),
            BPanel = (nint)_shape.PanelBytes,
            C = _dx + ((long)row * _shape.In) + column,
            CRow = _shape.In,
            Panels = panels,
            Accumulate = panel > 0 || _accumulate,
        };
    }

    // One item: one row.
    private readonly struct GatherJob<TPanel>(Shape shape, int* ids, float* y) : IParallelJob
        where TPanel : unmanaged, IPanel
    {
        private readonly Shape _shape = shape;
        private readonly int* _ids = ids;
        private readonly float* _y = y;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            byte* source = _shape.Panels + (_ids[item] / PanelPacking.Width * _shape.PanelBytes);
            int lane = _ids[item] % PanelPacking.Width;
            float* y = _y + ((long)item * _shape.In);
            for (int c = 0; c < _shape.In; c++)
            {
                y[c] = TPanel.Read(source + ((long)c * TPanel.RowBytes), lane);
            }
        }
    }
}
