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
    public static long ScratchBytes(TorchContext context, long rows, int columns)
    {
        long filled = FilledColumns(columns);
        return Math.Min(rows, context.RowsPerPiece(filled)) * ((2 * filled) + (filled / BitsPerByte));
    }

    public static void Pack(TorchContext context, TensorSlice source, PackedFormat format, TensorSlice packed) =>
        InPieces(context, source, format, packed, (rows, stored) =>
        {
            Tensor values = TorchContext.Of(rows);
            if (format == PackedFormat.BF16)
            {
                stored.narrow(1, 0, rows.Columns).copy_(values);
                return;
            }

            Tensor bits = torch.zeros(rows.Rows, FilledColumns(rows.Columns), torch.ScalarType.Byte, context.Device);
            using (Tensor isAbove = values.gt(TorchContext.Zero))
            {
                bits.narrow(1, 0, rows.Columns).copy_(isAbove);
            }

            Tensor summands = bits.view(rows.Rows, -1, BitsPerByte).mul_(context.BitValues);
            stored.copy_(summands.sum(-1L, keepdim: false, torch.ScalarType.Byte));
        });

    public static void Unpack(TorchContext context, TensorSlice packed, PackedFormat format, TensorSlice destination) =>
        InPieces(context, destination, format, packed, (rows, stored) =>
        {
            Tensor values = format == PackedFormat.BF16 ? stored : stored.view(rows.Rows, -1, 1).bitwise_and(context.BitValues)
                .to_type(torch.ScalarType.Bool).view(rows.Rows, -1);
            TorchContext.Of(rows).copy_(values.narrow(1, 0, rows.Columns));
        });

    // Rows and what is stored of them, so many at a time that sign bits have room.
    private static void InPieces(
        TorchContext context, TensorSlice rows, PackedFormat format, TensorSlice packed, Action<TensorSlice, Tensor> convert)
    {
        TorchPacked all = Of(rows, format, packed);
        int count = context.RowsPerPiece(FilledColumns(rows.Columns));
        for (int row = 0; row < rows.Rows; row += count)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            TensorSlice piece = rows.Slice(row, Math.Min(count, rows.Rows - row));
            convert(piece, all.Part(packed.Start + row, piece.Rows));
        }
    }

    // Columns of whole floats of bits.
    private static int FilledColumns(int columns) => 32 * PackedFormats.PackedColumns(columns, PackedFormat.SignBits);

    private static TorchPacked Of(TensorSlice rows, PackedFormat format, TensorSlice packed)
    {
        Check.That(rows.Rows == packed.Rows && packed.Columns == PackedFormats.PackedColumns(rows.Columns, format));
        TorchPacked result = (TorchPacked)packed.Tensor;
        Check.That(result.Format == format);
        return result;
    }
}
