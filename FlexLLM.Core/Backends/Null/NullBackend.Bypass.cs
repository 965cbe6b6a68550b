using FlexLLM.Primitives;

namespace FlexLLM.Backends.Null;

/// <summary>The operations that a bypass is composed of.</summary>
internal partial class NullBackend
{
    public void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate)
    {
        Check.That(x.Rows == u.Rows && x.Columns == m.Wide && u.Columns == m.Inner);
        Charge(x.Rows, 2 * Elements(x) * m.Inner, BytesOf(x) + BytesOf(m) + Written(u, accumulate));
    }

    public void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate)
    {
        Check.That(u.Rows == y.Rows && u.Columns == m.Inner && y.Columns == m.Wide);
        Charge(u.Rows, 2 * Elements(y) * m.Inner, BytesOf(u) + BytesOf(m) + Written(y, accumulate));
    }

    public void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient)
    {
        Check.That(u.Rows == x.Rows && gradient.Rows == u.Columns && gradient.Columns == x.Columns);
        Charge(u.Rows, 2 * Elements(x) * u.Columns, BytesOf(u) + BytesOf(x) + Written(gradient, accumulate: true));
    }

    public void AddBias(TensorSlice y, DeviceTensor bias)
    {
        CheckRow(bias, y);
        Charge(y.Rows, Elements(y), BytesOf(bias) + Written(y, accumulate: true));
    }

    public void AddColumnSums(TensorSlice dy, DeviceTensor gradient)
    {
        CheckRow(gradient, dy);
        Charge(dy.Rows, Elements(dy), BytesOf(dy) + Written(gradient, accumulate: true));
    }

    public void ScaleColumns(TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate)
    {
        CheckAlike(x, y);
        CheckRow(gain, x);
        Charge(x.Rows, 2 * Elements(x), BytesOf(x) + BytesOf(gain) + Written(y, accumulate));
    }

    public void ScaleColumnsBackward(
        TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate)
    {
        CheckAlike(x, dy);
        CheckRow(gain, x);
        CheckRow(gradGain, x);
        double flops = 2 * Elements(x);
        double bytes = BytesOf(x) + BytesOf(dy) + BytesOf(gain) + Written(gradGain, accumulate: true);
        if (dx is TensorSlice slice)
        {
            CheckAlike(x, slice);
            flops += 2 * Elements(slice);
            bytes += Written(slice, accumulate);
        }

        Charge(x.Rows, flops, bytes);
    }

    public void CopyColumns(TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns)
    {
        Check.That(source.Rows == destination.Rows && columns >= 0);
        Check.That(sourceColumn >= 0 && sourceColumn <= source.Columns - columns);
        Check.That(destinationColumn >= 0 && destinationColumn <= destination.Columns - columns);
        Check.That(BytesOf(source) >= 0 && BytesOf(destination) >= 0);
        Charge(source.Rows, 0, 2.0 * source.Rows * columns * sizeof(float));
    }

    public void Relu(TensorSlice x, TensorSlice y)
    {
        CheckAlike(x, y);
        Charge(x.Rows, Elements(x), BytesOf(x) + BytesOf(y));
    }

    public void ReluBackward(TensorSlice y, TensorSlice dy, TensorSlice dx)
    {
        CheckAlike(y, dy);
        CheckAlike(y, dx);
        Charge(y.Rows, Elements(y), BytesOf(y) + BytesOf(dy) + BytesOf(dx));
    }

    public void Silu(TensorSlice x, TensorSlice y)
    {
        CheckAlike(x, y);
        Charge(x.Rows, 5 * Elements(x), BytesOf(x) + BytesOf(y));
    }

    public void SiluBackward(TensorSlice x, TensorSlice dy, TensorSlice dx)
    {
        CheckAlike(x, dy);
        CheckAlike(x, dx);
        Charge(x.Rows, 9 * Elements(x), BytesOf(x) + BytesOf(dy) + BytesOf(dx));
    }

    public void Pack(TensorSlice source, PackedFormat format, TensorSlice packed)
    {
        CheckPacked(source, format, packed);
        Charge(source.Rows, Elements(source), BytesOf(source) + BytesOf(packed));
    }

    public void Unpack(TensorSlice packed, PackedFormat format, TensorSlice destination)
    {
        CheckPacked(destination, format, packed);
        Charge(packed.Rows, Elements(destination), BytesOf(packed) + BytesOf(destination));
    }

    private static void CheckRow(DeviceTensor row, TensorSlice matrix) =>
        Check.That(row.Rows == 1 && row.Columns == matrix.Columns);

    private static void CheckPacked(TensorSlice rows, PackedFormat format, TensorSlice packed) =>
        Check.That(rows.Rows == packed.Rows && packed.Columns == PackedFormats.PackedColumns(rows.Columns, format));
}
