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

    // Weight rows that are transposed at a time, and most panels of 16 input columns beside each other.
    private const int OutputsPerTile = 256;
    private const int InputPanelsPerItem = 16;

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

        int panels = PanelPacking.Count(weight.InFeatures);
        int rounds = (panels + (InputPanelsPerItem * cpu.Team.Threads) - 1) / (InputPanelsPerItem * cpu.Team.Threads);
        int perItem = (panels + (rounds * cpu.Team.Threads) - 1) / (rounds * cpu.Team.Threads);
        int items = (panels + perItem - 1) / perItem;
        long tileFloats = TileFloats(weight.InFeatures, cpu.Team.Threads);
        float* tiles = cpu.Workspace.Floats(WorkspaceSlot.TransposedWeight, tileFloats * cpu.Team.Threads);
        Shape shape = new(weight, rows);
        long work = (long)rows * weight.InFeatures * weight.OutFeatures;
        if (weight.Type == DType.BF16)
        {
            cpu.Team.Run(new BackwardJob<BF16Panel>(shape, dy, dx, accumulate, perItem, tiles, tileFloats), items, work);
        }
        else
        {
            cpu.Team.Run(new BackwardJob<F32Panel>(shape, dy, dx, accumulate, perItem, tiles, tileFloats), items, work);
        }
    }

    /// <summary>Floats of transposed weights that a thread has in work: never fewer for wider inputs.</summary>
    public static long TileFloats(int inFeatures, int threads)
    {
        int perItem = Math.Min(InputPanelsPerItem, (PanelPacking.Count(inFeatures) + threads - 1) / threads);
        return (long)perItem * OutputsPerTile * PanelPacking.Width;
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

    // One item: all rows of perItem panels of 16 input columns. Weight tiles are transposed into scratch, F32.
    private readonly struct BackwardJob<TPanel>(
        Shape shape, float* dy, float* dx, bool accumulate, int perItem, float* tiles, long tileFloats) : IParallelJob
        where TPanel : unmanaged, IPanel
    {
        private readonly Shape _shape = shape;
        private readonly float* _dy = dy;
        private readonly float* _dx = dx;
        private readonly bool _accumulate = accumulate;
        private readonly int _perItem = perItem;
        private readonly float* _tiles = tiles;
        private readonly long _tileFloats = tileFloats;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int first = item * _perItem;
            int panels = Math.Min(_perItem, PanelPacking.Count(_shape.In) - first);
            int column = first * PanelPacking.Width;
            int columns = Math.Min(panels * PanelPacking.Width, _shape.In - column);
            float* tile = _tiles + (worker * _tileFloats);
            for (int output = 0; output < _shape.Out; output += OutputsPerTile)
            {
                int outputs = Math.Min(OutputsPerTile, _shape.Out - output);
                TransposeTile(tile, output, outputs, column, panels);
                for (int row = 0; row < _shape.Rows; row += RowsPerChunk)
                {
                    Gemm g = new()
                    {
                        A = _dy + ((long)row * _shape.Out) + output,
                        ARow = _shape.Out,
                        AStep = 1,
                        B = (byte*)tile,
                        BStep = F32Panel.RowBytes,
                        BPanel = OutputsPerTile * F32Panel.RowBytes,
                        C = _dx + ((long)row * _shape.In) + column,
                        CRow = _shape.In,
                        K = outputs,
                        Accumulate = output > 0 || _accumulate,
                    };
                    int rows = Math.Min(RowsPerChunk, _shape.Rows - row);
                    GemmBlocks.Multiply<F32Panel>(g, rows, panels, columns - ((panels - 1) * PanelPacking.Width));
                }
            }
        }

        // tile[j][o][16] = W[output + o, column + 16 j ..].
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void TransposeTile(float* tile, int output, int outputs, int column, int panels)
        {
            for (int o = 0; o < outputs; o += PanelPacking.Width)
            {
                byte* source = _shape.Panels + ((output + o) / PanelPacking.Width * _shape.PanelBytes);
                for (int j = 0; j < panels; j++)
                {
                    int row = column + (j * PanelPacking.Width);
                    float* destination = tile + ((((long)j * OutputsPerTile) + o) * PanelPacking.Width);
                    byte* first = source + ((long)row * TPanel.RowBytes);
                    Transpose.Tile<TPanel>(first, TPanel.RowBytes, _shape.In - row, destination, PanelPacking.Width);
                }
            }
        }
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
