using System.Numerics.Tensors;

namespace FlexLLM.Primitives;

/// <summary>The largest few of many values.</summary>
internal static class LargestValues
{
    // Most of a row is below the least value that is kept, which a vector comparison tells for as many at once.
    private const int BlockSize = 128;

    /// <summary>
    /// Fills values with the largest of a row, the largest first and of equals the lowest column, and columns with their places. A row
    /// with a NaN has one as its first value, and the rest of it says nothing.
    /// </summary>
    /// <param name="row">At least as many as are wanted.</param>
    /// <param name="values">As many as are wanted.</param>
    /// <param name="columns">The same length.</param>
    public static void Find(ReadOnlySpan<float> row, Span<float> values, Span<int> columns)
    {
        if (values.IsEmpty)
        {
            return;
        }

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
}
