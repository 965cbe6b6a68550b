using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>The operations that a bypass is composed of. Sums over rows are stored after every row.</summary>
internal sealed partial class ReferenceBackend
{
    public void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate)
    {
        Check.That(x.Columns == m.Wide);
        Store(Reference.Narrow(Read(x), Read(m.Values), scale), u, accumulate);
    }

    public void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate)
    {
        Check.That(u.Columns == m.Inner);
        Store(Reference.Widen(Read(u), Read(m.Values), scale), y, accumulate);
    }

    public void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient)
    {
        Check.That(u.Rows == x.Rows);
        for (int row = x.Rows - 1; row >= 0; row--)
        {
            Store(Reference.Outer(Read(u.Slice(row, 1)), Read(x.Slice(row, 1)), scale), gradient, accumulate: true);
        }
    }

    public void AddBias(TensorSlice y, DeviceTensor bias)
    {
        CheckRow(bias, y);
        Store(Reference.AddBias(Read(y), Read(bias)), y);
    }

    public void AddColumnSums(TensorSlice dy, DeviceTensor gradient)
    {
        CheckRow(gradient, dy);
        for (int row = dy.Rows - 1; row >= 0; row--)
        {
            Store(Read(dy.Slice(row, 1)), gradient, accumulate: true);
        }
    }

    public void ScaleColumns(TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate)
    {
        CheckRow(gain, x);
        Store(Reference.ScaleColumns(Read(x), Read(gain)), y, accumulate);
    }

    public void ScaleColumnsBackward(
        TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate)
    {
        Check.That(SameShape(x, dy));
        CheckRow(gain, x);
        CheckRow(gradGain, x);
        for (int row = x.Rows - 1; row >= 0; row--)
        {
            (Matrix gradient, Matrix d) =
                Reference.ScaleColumnsBackward(Read(x.Slice(row, 1)), Read(dy.Slice(row, 1)), Read(gain));
            Store(gradient, gradGain, accumulate: true);
            if (dx is TensorSlice slice)
            {
                Check.That(SameShape(x, slice));
                Store(d, slice.Slice(row, 1), accumulate);
            }
        }
    }

    public void CopyColumns(TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns)
    {
        Check.That(source.Rows == destination.Rows && columns >= 0 && sourceColumn >= 0 && destinationColumn >= 0);
        Check.That(sourceColumn + columns <= source.Columns && destinationColumn + columns <= destination.Columns);
        for (int row = 0; row < source.Rows; row++)
        {
            Span<float> from = Floats(source.Slice(row, 1)).Slice(sourceColumn, columns);
            from.CopyTo(Floats(destination.Slice(row, 1)).Slice(destinationColumn, columns));
        }
    }

    public void Relu(TensorSlice x, TensorSlice y) => Store(Reference.Relu(Read(x)), y);

    public void ReluBackward(TensorSlice y, TensorSlice dy, TensorSlice dx)
    {
        Check.That(SameShape(y, dy));
        Store(Reference.ReluBackward(Read(y), Read(dy)), dx);
    }

    public void Silu(TensorSlice x, TensorSlice y) => Store(Reference.Silu(Read(x)), y);

    public void SiluBackward(TensorSlice x, TensorSlice dy, TensorSlice dx)
    {
        Check.That(SameShape(x, dy));
        Store(Reference.SiluBackward(Read(x), Read(dy)), dx);
    }

    // Neighbours share a word, the first of them in its lowest bits.
    public void Pack(TensorSlice source, PackedFormat format, TensorSlice packed)
    {
        CheckPacked(source, format, packed);
        int bits = BitsOf(format);
        for (int row = 0; row < source.Rows; row++)
        {
            Span<float> from = Floats(source.Slice(row, 1));
            Span<float> to = Floats(packed.Slice(row, 1));
            uint[] words = new uint[to.Length];
            for (int c = 0; c < from.Length; c++)
            {
                uint code = format == PackedFormat.BF16 ? BFloat16(from[c]) : from[c] > 0 ? 1u : 0u;
                words[c * bits / 32] |= code << (c * bits % 32);
            }

            Array.ConvertAll(words, BitConverter.UInt32BitsToSingle).CopyTo(to);
        }
    }

    public void Unpack(TensorSlice packed, PackedFormat format, TensorSlice destination)
    {
        CheckPacked(destination, format, packed);
        int bits = BitsOf(format);
        for (int row = 0; row < packed.Rows; row++)
        {
            Span<float> from = Floats(packed.Slice(row, 1));
            Span<float> to = Floats(destination.Slice(row, 1));
            for (int c = 0; c < to.Length; c++)
            {
                uint word = BitConverter.SingleToUInt32Bits(from[c * bits / 32]) >> (c * bits % 32);
                to[c] = format == PackedFormat.BF16 ? BitConverter.UInt32BitsToSingle(word << 16) : word & 1;
            }
        }
    }

    private static int BitsOf(PackedFormat format) => format == PackedFormat.BF16 ? 16 : 1;

    private static uint BFloat16(float value) => float.IsNaN(value)
        ? 0x7FC0
        : BitConverter.SingleToUInt32Bits((float)Matrix.Filled(1, 1, value).Rounded(DType.BF16)[0, 0]) >> 16;

    private static void CheckRow(DeviceTensor row, TensorSlice matrix) =>
        Check.That(row.Rows == 1 && row.Columns == matrix.Columns);

    private static void CheckPacked(TensorSlice rows, PackedFormat format, TensorSlice packed) =>
        Check.That(rows.Rows == packed.Rows && packed.Columns == PackedFormats.PackedColumns(rows.Columns, format));
}
