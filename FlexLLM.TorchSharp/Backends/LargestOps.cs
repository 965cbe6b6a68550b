using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// The largest values of rows, so that logits stay on the device: two numbers for each of them go to the host, in one copy.
/// </summary>
internal static class LargestOps
{
    // Integers that F32 holds exactly.
    private const int ColumnsMax = 1 << 24;

    // libtorch's topk on a GPU sorts whole rows, in 48 bytes an element, where so few are so wide.
    private const int SortedRowsMax = 10;
    private const int SortedColumnsMin = 100_000;

    /// <summary>
    /// Temporaries in bytes: values, columns, and both as they go to the host; on a GPU also what rows of a large vocabulary are sorted
    /// in. The latter was never measured.
    /// </summary>
    public static long ScratchBytes(TorchContext context, long rows, long columns)
    {
        long sorted = context.OnHost || columns < SortedColumnsMin ? 0 : 48 * Math.Min(rows, SortedRowsMax) * columns;
        return sorted + (rows * Math.Min(columns, ScratchLimits.LargestMax) * ((3 * sizeof(float)) + sizeof(long)));
    }

    /// <summary>libtorch's argmax takes the first of equals, and NaN where there is one.</summary>
    public static void ArgMax(TorchContext context, TensorSlice x, Span<int> columns)
    {
        Check.That(columns.Length == x.Rows);
        float[] values = new float[x.Rows];
        Find(context, x, 1, values, columns, rows =>
        {
            Tensor largest = rows.argmax(1, keepdim: true);
            return (rows.gather(1, largest), largest);
        });
        for (int i = 0; i < values.Length; i++)
        {
            columns[i] = float.IsFinite(values[i]) ? columns[i] : -1;
        }
    }

    /// <summary>libtorch takes NaN for the largest of all.</summary>
    public static void Run(TorchContext context, TensorSlice x, int count, Span<float> values, Span<int> columns)
    {
        Check.That(count is > 0 and <= ScratchLimits.LargestMax && count <= x.Columns);
        Check.That(values.Length == x.Rows * count && columns.Length == values.Length);
        Find(context, x, count, values, columns, rows => rows.topk(count));
    }

    private static void Find(
        TorchContext context, TensorSlice x, int count, Span<float> values, Span<int> columns, Func<Tensor, (Tensor, Tensor)> find)
    {
        Check.That(x.Columns is > 0 and <= ColumnsMax);
        if (x.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        using TorchTensor found = new(context, 2 * x.Rows, count);
        (Tensor largest, Tensor places) = find(TorchContext.Of(x));
        TorchContext.Of(found.Slice(0, x.Rows)).copy_(largest);
        TorchContext.Of(found.Slice(x.Rows, x.Rows)).copy_(places);
        float[] numbers = new float[2 * values.Length];
        context.Download(found.Slice(0, 2 * x.Rows), numbers);
        numbers.AsSpan(0, values.Length).CopyTo(values);
        for (int i = 0; i < columns.Length; i++)
        {
            columns[i] = (int)numbers[values.Length + i];
        }
    }
}
