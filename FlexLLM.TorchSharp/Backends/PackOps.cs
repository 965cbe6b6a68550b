using System.Buffers;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// Rows made small and large again, on the host: the managed API of TorchSharp has no view of a tensor as another type, so bits
/// cannot be put together on a GPU. There each call waits for the device and copies its rows there and back. Neighbours share a
/// word, the first of them in its lowest bits; what is behind the last element is zero.
/// </summary>
internal static class PackOps
{
    private const int BitsPerWord = 32;
    private const uint BF16NaN = 0x7FC0;

    public static void Pack(TorchContext context, TensorSlice source, PackedFormat format, TensorSlice packed)
    {
        CheckShapes(source, format, packed);
        Run(context, source, packed, (from, to) => Pack(from, format, to));
    }

    public static void Unpack(TorchContext context, TensorSlice packed, PackedFormat format, TensorSlice destination)
    {
        CheckShapes(destination, format, packed);
        Run(context, packed, destination, (from, to) => Unpack(from, format, to));
    }

    private static void Run(TorchContext context, TensorSlice source, TensorSlice destination, RowAction action)
    {
        if (source.Rows == 0)
        {
            return;
        }

        int rowsPerPiece = Math.Min(source.Rows, context.RowsPerPiece(Math.Max(source.Columns, destination.Columns)));
        float[] from = ArrayPool<float>.Shared.Rent(rowsPerPiece * source.Columns);
        float[] to = ArrayPool<float>.Shared.Rent(rowsPerPiece * destination.Columns);
        for (int row = 0; row < source.Rows; row += rowsPerPiece)
        {
            int count = Math.Min(rowsPerPiece, source.Rows - row);
            Span<float> read = from.AsSpan(0, count * source.Columns);
            Span<float> written = to.AsSpan(0, count * destination.Columns);
            context.Download(source.Slice(row, count), read);
            for (int i = 0; i < count; i++)
            {
                action(
                    read.Slice(i * source.Columns, source.Columns), written.Slice(i * destination.Columns, destination.Columns));
            }

            context.Upload(written, destination.Slice(row, count));
        }

        ArrayPool<float>.Shared.Return(from);
        ArrayPool<float>.Shared.Return(to);
    }

    private static void Pack(ReadOnlySpan<float> row, PackedFormat format, Span<float> packed)
    {
        int bits = BitsOf(format);
        int perWord = BitsPerWord / bits;
        for (int word = 0; word < packed.Length; word++)
        {
            uint value = 0;
            ReadOnlySpan<float> elements = row[(word * perWord)..Math.Min(row.Length, (word + 1) * perWord)];
            for (int i = 0; i < elements.Length; i++)
            {
                uint code = format == PackedFormat.BF16 ? NearestBF16(elements[i]) : elements[i] > 0 ? 1u : 0u;
                value |= code << (i * bits);
            }

            packed[word] = BitConverter.UInt32BitsToSingle(value);
        }
    }

    private static void Unpack(ReadOnlySpan<float> packed, PackedFormat format, Span<float> row)
    {
        int bits = BitsOf(format);
        int perWord = BitsPerWord / bits;
        for (int i = 0; i < row.Length; i++)
        {
            uint word = BitConverter.SingleToUInt32Bits(packed[i / perWord]) >> (i % perWord * bits);
            row[i] = format == PackedFormat.BF16 ? BitConverter.UInt32BitsToSingle(word << 16) : word & 1;
        }
    }

    private static int BitsOf(PackedFormat format) => format == PackedFormat.BF16 ? 16 : 1;

    // Half a unit of the upper half, less one where it is even, carries into it where the value is to be rounded up.
    private static uint NearestBF16(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return float.IsNaN(value) ? BF16NaN : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    }

    private static void CheckShapes(TensorSlice rows, PackedFormat format, TensorSlice packed) =>
        Check.That(rows.Rows == packed.Rows && packed.Columns == PackedFormats.PackedColumns(rows.Columns, format));

    private delegate void RowAction(ReadOnlySpan<float> from, Span<float> to);
}
