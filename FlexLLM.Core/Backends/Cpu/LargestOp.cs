using System.Numerics.Tensors;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>The largest values of rows: all of the logits that most requests need.</summary>
internal static unsafe class LargestOp
{
    // Most of a row is below the least value that is kept, which a vector comparison tells for as many at once.
    private const int BlockSize = 128;

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
            Run(Row(x, i), values.Slice(i * count, count), columns.Slice(i * count, count));
        }
    }

    private static void Run(ReadOnlySpan<float> row, Span<float> values, Span<int> columns)
    {
        values.Fill(float.NegativeInfinity);
        columns.Fill(-1);
        for (int start = 0; start < row.Length; start += BlockSize)
        {
            ReadOnlySpan<float> block = row[start..Math.Min(row.Length, start + BlockSize)];
            float largest = TensorPrimitives.Max(block);
            if (float.IsNaN(largest))
            {
                values[0] = largest;
                return;
            }

            if (largest > values[^1] || columns[^1] < 0)
            {
                Insert(block, start, values, columns);
            }
        }
    }

    private static void Insert(ReadOnlySpan<float> block, int start, Span<float> values, Span<int> columns)
    {
        for (int i = 0; i < block.Length; i++)
        {
            if (block[i] <= values[^1] && columns[^1] >= 0)
            {
                continue;
            }

            int at = values.Length - 1;
            for (; at > 0 && (columns[at - 1] < 0 || values[at - 1] < block[i]); at--)
            {
                (values[at], columns[at]) = (values[at - 1], columns[at - 1]);
            }

            (values[at], columns[at]) = (block[i], start + i);
        }
    }

    private static ReadOnlySpan<float> Row(TensorSlice x, int row) => new(CpuTensor.Of(x) + ((long)row * x.Columns), x.Columns);
}
