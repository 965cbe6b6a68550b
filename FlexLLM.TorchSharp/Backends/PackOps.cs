using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// Rows made small and large again where they are: as BF16 by a copy, which rounds; as bits of what is above zero by sums of powers of
/// two, of which each byte has the eight.
/// </summary>
internal static class PackOps
{
    private const int BitsPerByte = 8;

    /// <summary>
    /// Temporaries of sign bits in bytes, of the rows that are packed at a time: a byte for whether an element is above zero and one for
    /// what it counts, with what fills up the last float, and the bytes that they are put together to.
    /// </summary>
    public static long ScratchBytes(TorchContext context, long rows, long columns)
    {
        long filled = FilledColumns(columns);
        return Math.Min(rows, context.RowsPerPiece(filled)) * ((2 * filled) + (filled / BitsPerByte));
    }

    public static void Pack(TorchContext context, TensorSlice source, PackedFormat format, TensorSlice packed)
    {
        TorchPacked rows = Of(source, format, packed);
        if (format == PackedFormat.BF16)
        {
            if (source.Rows > 0)
            {
                using DisposeScope all = torch.NewDisposeScope();
                rows.Part(packed.Start, packed.Rows).narrow(1, 0, source.Columns).copy_(TorchContext.Of(source));
            }

            return;
        }

        int count = context.RowsPerPiece(FilledColumns(source.Columns));
        for (int row = 0; row < source.Rows; row += count)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            TensorSlice piece = source.Slice(row, Math.Min(count, source.Rows - row));
            Tensor bits = torch.zeros(piece.Rows, FilledColumns(piece.Columns), torch.ScalarType.Byte, context.Device);
            using (Tensor isAbove = TorchContext.Of(piece).gt(TorchContext.Zero))
            {
                bits.narrow(1, 0, piece.Columns).copy_(isAbove);
            }

            Tensor summands = bits.view(piece.Rows, -1, BitsPerByte).mul_(context.BitValues);
            rows.Part(packed.Start + row, piece.Rows).copy_(summands.sum(-1L, keepdim: false, torch.ScalarType.Byte));
        }
    }

    public static void Unpack(TorchContext context, TensorSlice packed, PackedFormat format, TensorSlice destination)
    {
        TorchPacked rows = Of(destination, format, packed);
        if (format == PackedFormat.BF16)
        {
            if (destination.Rows > 0)
            {
                using DisposeScope all = torch.NewDisposeScope();
                TorchContext.Of(destination).copy_(rows.Part(packed.Start, packed.Rows).narrow(1, 0, destination.Columns));
            }

            return;
        }

        int count = context.RowsPerPiece(FilledColumns(destination.Columns));
        for (int row = 0; row < destination.Rows; row += count)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            TensorSlice piece = destination.Slice(row, Math.Min(count, destination.Rows - row));
            Tensor bytes = rows.Part(packed.Start + row, piece.Rows).view(piece.Rows, -1, 1);
            Tensor isAbove = bytes.bitwise_and(context.BitValues).to_type(torch.ScalarType.Bool);
            TorchContext.Of(piece).copy_(isAbove.view(piece.Rows, -1).narrow(1, 0, piece.Columns));
        }
    }

    // Columns of whole floats of bits.
    private static long FilledColumns(long columns) => (columns + 31) / 32 * 32;

    private static TorchPacked Of(TensorSlice rows, PackedFormat format, TensorSlice packed)
    {
        Check.That(rows.Rows == packed.Rows && packed.Columns == PackedFormats.PackedColumns(rows.Columns, format));
        TorchPacked result = (TorchPacked)packed.Tensor;
        Check.That(result.Format == format);
        return result;
    }
}
