using System.Runtime.CompilerServices;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>Logits for chosen rows, and the fused head with cross-entropy.</summary>
internal static unsafe class CrossEntropyOp
{
    // Rows whose logits exist at once: enough to share the reading and transposing of the head.
    private const int RowsPerChunk = 48;

    public static void Logits(CpuContext cpu, TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits)
    {
        Check.That(logits.Rows == rows.Length);
        Check.That(logits.Columns == head.OutFeatures && x.Columns == head.InFeatures);
        float* selected = cpu.Workspace.Floats(WorkspaceSlot.SelectedRows, SelectedFloats(rows.Length, x.Columns));
        for (int i = 0; i < rows.Length; i++)
        {
            Check.That(rows[i] >= 0 && rows[i] < x.Rows);
            Row(CpuTensor.Of(x), rows[i], x.Columns).CopyTo(Row(selected, i, x.Columns));
        }

        LinearOps.Forward(
            cpu, selected, rows.Length, x.Columns, (CpuWeight)head, null, CpuTensor.Of(logits), accumulate: false);
    }

    public static void Run(
        CpuContext cpu, TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx,
        TensorSlice losses)
    {
        Check.That(targets.Length == x.Rows && dx.Rows == x.Rows && losses.Rows == x.Rows && losses.Columns == 1);
        Check.That(x.Columns == head.InFeatures && dx.Columns == x.Columns);
        float* lossOf = CpuTensor.Of(losses);
        int* rows = stackalloc int[RowsPerChunk];
        int count = 0;
        for (int i = 0; i < targets.Length; i++)
        {
            Check.That(targets[i] < head.OutFeatures);
            if (targets[i] >= 0)
            {
                rows[count++] = i;
            }
            else
            {
                lossOf[i] = 0;
                Row(CpuTensor.Of(dx), i, dx.Columns).Clear();
            }

            if (count == RowsPerChunk || (i == targets.Length - 1 && count > 0))
            {
                RunChunk(cpu, x, targets, (CpuWeight)head, gradientScale, dx, lossOf, new ReadOnlySpan<int>(rows, count));
                count = 0;
            }
        }
    }

    /// <summary>Rows whose logits exist at once, of so many with a target.</summary>
    public static int ChunkRows(int rows) => Math.Min(RowsPerChunk, rows);

    /// <summary>Floats of chosen rows beside each other.</summary>
    public static long SelectedFloats(int rows, int columns) => (long)rows * columns;

    /// <summary>Bytes of the losses of so many rows.</summary>
    public static long LossBytes(int rows) => (long)rows * sizeof(RowLoss);

    private static void RunChunk(
        CpuContext cpu, TensorSlice x, ReadOnlySpan<int> targets, CpuWeight head, float gradientScale, TensorSlice dx,
        float* lossOf, ReadOnlySpan<int> rows)
    {
        int hidden = x.Columns;
        float* selected = cpu.Workspace.Floats(WorkspaceSlot.SelectedRows, SelectedFloats(rows.Length, hidden));
        float* gradients = cpu.Workspace.Floats(WorkspaceSlot.SelectedGradients, SelectedFloats(rows.Length, hidden));
        float* logits = cpu.Workspace.Floats(WorkspaceSlot.Logits, SelectedFloats(rows.Length, head.OutFeatures));
        RowLoss* rowLosses = (RowLoss*)cpu.Workspace.Bytes(WorkspaceSlot.RowLosses, LossBytes(rows.Length));
        for (int i = 0; i < rows.Length; i++)
        {
            Row(CpuTensor.Of(x), rows[i], hidden).CopyTo(Row(selected, i, hidden));
            rowLosses[i].Target = targets[rows[i]];
        }

        LinearOps.Forward(cpu, selected, rows.Length, hidden, head, null, logits, accumulate: false);
        long work = (long)rows.Length * head.OutFeatures * 8;
        cpu.Team.Run(new SoftmaxJob(logits, head.OutFeatures, gradientScale, rowLosses), rows.Length, work);
        LinearOps.BackwardInput(cpu, logits, rows.Length, head, gradients, accumulate: false);
        for (int i = 0; i < rows.Length; i++)
        {
            Row(gradients, i, hidden).CopyTo(Row(CpuTensor.Of(dx), rows[i], hidden));
            lossOf[rows[i]] = rowLosses[i].Loss;
        }
    }

    private static Span<float> Row(float* matrix, int row, int columns) => new(matrix + ((long)row * columns), columns);

    private struct RowLoss
    {
        public int Target;
        public float Loss;
    }

    // One item: one row. logits become gradientScale * (softmax - onehot).
    private readonly struct SoftmaxJob(float* logits, int columns, float gradientScale, RowLoss* losses) : IParallelJob
    {
        // Columns that are summed in F32 before their sum is added in double.
        private const int ColumnsPerSum = 4096;

        private readonly float* _logits = logits;
        private readonly int _columns = columns;
        private readonly float _gradientScale = gradientScale;
        private readonly RowLoss* _losses = losses;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            float* row = _logits + ((long)item * _columns);
            int target = _losses[item].Target;
            float max = VectorMath.Max(row, _columns);
            double above = (double)max - row[target];
            double sum = 0;
            for (int c = 0; c < _columns; c += ColumnsPerSum)
            {
                sum += VectorMath.Sum(new ShiftedExponentials(row + c, max), Math.Min(ColumnsPerSum, _columns - c));
            }

            _losses[item].Loss = (float)(Math.Log(sum) + above);
            AttentionTiles.Scale(row, (float)(_gradientScale / sum), row, _columns);
            row[target] -= _gradientScale;
        }
    }
}
