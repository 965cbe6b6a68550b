using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>Operations between a matrix and one number a column, and copies of columns.</summary>
internal static unsafe class ColumnOps
{
    // Elements of whole rows in an item, or columns of all rows where rows are summed.
    private const int ElementsPerItem = 1 << 14;
    private const int ColumnsPerItem = 128;

    /// <summary>What happens to min(count, 8) elements from a place of a row-major matrix on: loads first, then stores.</summary>
    private interface IColumnOp
    {
        void Apply(long element, int column, int count);
    }

    public static void AddBias(CpuContext cpu, TensorSlice y, DeviceTensor bias)
    {
        CheckRow(bias, y);
        RunByRows(cpu, new AddBiasOp(CpuTensor.Of(y), CpuTensor.Of(bias)), y);
    }

    public static void AddColumnSums(CpuContext cpu, TensorSlice dy, DeviceTensor gradient)
    {
        CheckRow(gradient, dy);
        RunByColumns(cpu, new ColumnSumOp(CpuTensor.Of(dy), CpuTensor.Of(gradient)), dy);
    }

    public static void Scale(CpuContext cpu, TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate)
    {
        Check.That(x.Rows == y.Rows && x.Columns == y.Columns);
        CheckRow(gain, x);
        RunByRows(cpu, new ScaleOp(CpuTensor.Of(x), CpuTensor.Of(gain), CpuTensor.Of(y), accumulate), x);
    }

    public static void ScaleBackward(
        CpuContext cpu, TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate)
    {
        Check.That(x.Rows == dy.Rows && x.Columns == dy.Columns);
        Check.That(dx is null || (dx.Value.Rows == x.Rows && dx.Value.Columns == x.Columns));
        CheckRow(gain, x);
        CheckRow(gradGain, x);
        ScaleBackwardOp op = new(
            CpuTensor.Of(x), CpuTensor.Of(dy), CpuTensor.Of(gain), CpuTensor.Of(gradGain),
            dx is null ? null : CpuTensor.Of(dx.Value), accumulate);
        RunByColumns(cpu, op, x);
    }

    public static void Copy(
        CpuContext cpu, TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns)
    {
        Check.That(source.Rows == destination.Rows && columns >= 0);
        Check.That(sourceColumn >= 0 && sourceColumn <= source.Columns - columns);
        Check.That(destinationColumn >= 0 && destinationColumn <= destination.Columns - columns);
        if (columns == 0)
        {
            return;
        }

        int rowsPerItem = RowsPerItem(columns);
        CopyJob job = new(
            CpuTensor.Of(source) + sourceColumn, source.Columns, CpuTensor.Of(destination) + destinationColumn,
            destination.Columns, source.Rows, columns, rowsPerItem);
        cpu.Team.Run(job, (source.Rows + rowsPerItem - 1) / rowsPerItem, (long)source.Rows * columns);
    }

    private static void CheckRow(DeviceTensor row, TensorSlice matrix) =>
        Check.That(row.Rows == 1 && row.Columns == matrix.Columns);

    private static int RowsPerItem(int columns) => Math.Max(1, ElementsPerItem / columns);

    private static void RunByRows<TOp>(CpuContext cpu, TOp op, TensorSlice shape)
        where TOp : unmanaged, IColumnOp
    {
        int rowsPerItem = RowsPerItem(Math.Max(1, shape.Columns));
        int items = (shape.Rows + rowsPerItem - 1) / rowsPerItem;
        ColumnJob<TOp> job = new(op, shape.Rows, shape.Columns, rowsPerItem, Math.Max(1, shape.Columns));
        cpu.Team.Run(job, items, (long)shape.Rows * shape.Columns);
    }

    private static void RunByColumns<TOp>(CpuContext cpu, TOp op, TensorSlice shape)
        where TOp : unmanaged, IColumnOp
    {
        int items = (shape.Columns + ColumnsPerItem - 1) / ColumnsPerItem;
        ColumnJob<TOp> job = new(op, shape.Rows, shape.Columns, Math.Max(1, shape.Rows), ColumnsPerItem);
        cpu.Team.Run(job, items, (long)shape.Rows * shape.Columns);
    }

    // One item: a block of rows, in descending order, and a range of columns.
    private readonly struct ColumnJob<TOp>(TOp op, int rows, int columns, int rowsPerItem, int columnsPerItem) : IParallelJob
        where TOp : unmanaged, IColumnOp
    {
        private readonly TOp _op = op;
        private readonly int _rows = rows;
        private readonly int _columns = columns;
        private readonly int _rowsPerItem = rowsPerItem;
        private readonly int _columnsPerItem = columnsPerItem;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            TOp op = _op;
            int ranges = (_columns + _columnsPerItem - 1) / _columnsPerItem;
            int firstRow = item / ranges * _rowsPerItem;
            int firstColumn = item % ranges * _columnsPerItem;
            int end = Math.Min(_columns, firstColumn + _columnsPerItem);
            for (int row = Math.Min(_rows, firstRow + _rowsPerItem) - 1; row >= firstRow; row--)
            {
                long start = (long)row * _columns;
                int c = firstColumn;
                for (; c + VectorMath.Lanes <= end; c += VectorMath.Lanes)
                {
                    op.Apply(start + c, c, VectorMath.Lanes);
                }

                if (c < end)
                {
                    op.Apply(start + c, c, end - c);
                }
            }
        }
    }

    private readonly struct AddBiasOp(float* y, float* bias) : IColumnOp
    {
        private readonly float* _y = y;
        private readonly float* _bias = bias;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long element, int column, int count) =>
            VectorMath.Store(Vector256.Load(_y + element) + Vector256.Load(_bias + column), _y + element, count);
    }

    private readonly struct ColumnSumOp(float* dy, float* sums) : IColumnOp
    {
        private readonly float* _dy = dy;
        private readonly float* _sums = sums;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long element, int column, int count) =>
            VectorMath.Store(Vector256.Load(_sums + column) + Vector256.Load(_dy + element), _sums + column, count);
    }

    // y (+)= x * (gain - 1)
    private readonly struct ScaleOp(float* x, float* gain, float* y, bool accumulate) : IColumnOp
    {
        private readonly float* _x = x;
        private readonly float* _gain = gain;
        private readonly float* _y = y;
        private readonly bool _accumulate = accumulate;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long element, int column, int count)
        {
            Vector256<float> x = Vector256.Load(_x + element);
            Vector256<float> g = Vector256.Load(_gain + column) - Vector256<float>.One;
            Vector256<float> y = _accumulate ? Vector256.FusedMultiplyAdd(x, g, Vector256.Load(_y + element)) : x * g;
            VectorMath.Store(y, _y + element, count);
        }
    }

    // gradGain += x * dy, dx (+)= dy * (gain - 1)
    private readonly struct ScaleBackwardOp(float* x, float* dy, float* gain, float* gradGain, float* dx, bool accumulate)
        : IColumnOp
    {
        private readonly float* _x = x;
        private readonly float* _dy = dy;
        private readonly float* _gain = gain;
        private readonly float* _gradGain = gradGain;
        private readonly float* _dx = dx;
        private readonly bool _accumulate = accumulate;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long element, int column, int count)
        {
            Vector256<float> dy = Vector256.Load(_dy + element);
            Vector256<float> sum = Vector256.Load(_gradGain + column);
            sum = Vector256.FusedMultiplyAdd(Vector256.Load(_x + element), dy, sum);
            if (_dx != null)
            {
                Vector256<float> g = Vector256.Load(_gain + column) - Vector256<float>.One;
                Vector256<float> dx = _accumulate ? Vector256.FusedMultiplyAdd(dy, g, Vector256.Load(_dx + element)) : dy * g;
                VectorMath.Store(dx, _dx + element, count);
            }

            VectorMath.Store(sum, _gradGain + column, count);
        }
    }

    // One item: a block of rows.
    private readonly struct CopyJob(
        float* source, int sourceStep, float* destination, int destinationStep, int rows, int columns, int rowsPerItem)
        : IParallelJob
    {
        private readonly float* _source = source;
        private readonly float* _destination = destination;
        private readonly int _sourceStep = sourceStep;
        private readonly int _destinationStep = destinationStep;
        private readonly int _rows = rows;
        private readonly int _columns = columns;
        private readonly int _rowsPerItem = rowsPerItem;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            long bytes = (long)_columns * sizeof(float);
            int end = Math.Min(_rows, (item + 1) * _rowsPerItem);
            for (int row = item * _rowsPerItem; row < end; row++)
            {
                float* destination = _destination + ((long)row * _destinationStep);
                Buffer.MemoryCopy(_source + ((long)row * _sourceStep), destination, bytes, bytes);
            }
        }
    }
}
