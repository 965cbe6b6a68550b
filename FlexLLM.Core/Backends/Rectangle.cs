using System.Numerics.Tensors;
using FlexLLM.Primitives;

namespace FlexLLM.Backends;

/// <summary>
/// Where a part of a row-major matrix lies: <paramref name="Rows"/> rows of <paramref name="Columns"/> elements, the first of them
/// element <paramref name="Start"/> of a slice, counted row by row, and each row <paramref name="Stride"/> elements after the one before.
/// </summary>
internal readonly record struct Rectangle(long Start, int Rows, int Columns, long Stride)
{
    /// <summary>Its elements follow each other without a gap.</summary>
    public bool IsDense => Columns == Stride || Rows <= 1;

    public bool IsEmpty => Rows == 0 || Columns == 0;

    /// <summary>Behind its last element; of none at all its start.</summary>
    public long End => IsEmpty ? Start : Start + ((Rows - 1) * Stride) + Columns;

    /// <summary>A dense one as a single row.</summary>
    public Rectangle AsOneRow()
    {
        Check.That(IsDense);
        int count = checked(Rows * Columns);
        return new Rectangle(Start, 1, count, count);
    }

    /// <summary>
    /// destination (+)= source, element by element, on the host: each of the two in a rectangle of one shape. Copies keep all bits.
    /// </summary>
    public static void Move(
        ReadOnlySpan<float> source, Rectangle from, Span<float> destination, Rectangle to, bool accumulate)
    {
        CheckPair(from, source.Length, to, destination.Length);
        for (int row = 0; row < from.Rows; row++)
        {
            ReadOnlySpan<float> read = source.Slice((int)(from.Start + (row * from.Stride)), from.Columns);
            Span<float> written = destination.Slice((int)(to.Start + (row * to.Stride)), to.Columns);
            if (accumulate)
            {
                TensorPrimitives.Add(written, read, written);
            }
            else
            {
                read.CopyTo(written);
            }
        }
    }

    /// <summary>Are both of one shape, and each inside so many elements?</summary>
    public static void CheckPair(Rectangle from, long sourceLength, Rectangle to, long destinationLength)
    {
        Check.That((from.Rows, from.Columns) == (to.Rows, to.Columns));
        Check.That(from.Start >= 0 && from.End <= sourceLength);
        Check.That(to.Start >= 0 && to.End <= destinationLength);
    }
}
