using System.Numerics.Tensors;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>The largest values of rows: all of the logits that most requests need.</summary>
internal static unsafe class LargestOp
{
    public static void ArgMax(TensorSlice x, Span<int> columns)
    {
        Check.That(columns.Length == x.Rows && x.Columns > 0);
        for (int i = 0; i < columns.Length; i++)
        {
            ReadOnlySpan<float> row = Row(x, i);
            float largest = TensorPrimitives.Max(row); // NaN where any value is.
            columns[i] = float.IsFinite(largest) ? row.IndexOf(largest) : -1;
        }
    }

    public static void Run(TensorSlice x, int count, Span<float> values, Span<int> columns)
    {
        Check.That(count > 0 && count <= x.Columns && values.Length == x.Rows * count && columns.Length == values.Length);
        for (int i = 0; i < x.Rows; i++)
        {
            LargestValues.Find(Row(x, i), values.Slice(i * count, count), columns.Slice(i * count, count));
        }
    }

    private static ReadOnlySpan<float> Row(TensorSlice x, int row) => new(CpuTensor.Of(x) + ((long)row * x.Columns), x.Columns);
}
