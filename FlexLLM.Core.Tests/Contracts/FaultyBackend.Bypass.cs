using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>The operations that a bypass is composed of.</summary>
internal sealed partial class FaultyBackend
{
    public override void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate)
    {
        if (fault == "narrow scales what it adds to" && accumulate)
        {
            Change(u, values => Array.ConvertAll(values, value => value * scale));
        }

        if (fault == "narrow forgets a column")
        {
            TensorSlice copy = Inner.Allocate(x.Rows, x.Columns);
            Inner.Copy(x, copy);
            Change(copy, values => [.. values.Select((value, i) => i % copy.Columns == 3 ? 0 : value)]);
            x = copy;
        }

        Inner.Narrow(x, m, fault == "narrow without scale" ? 1 : scale, u, accumulate && fault != "narrow overwrites");
        Spoil("narrow off by 1e-5", u);
        if (u.Rows > 1)
        {
            Spoil("narrow depends on its company", u);
        }
    }

    public override void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate)
    {
        Inner.Widen(u, m, fault == "widen scales twice" ? scale * scale : scale, y, accumulate && fault != "widen overwrites");
        Spoil("widen off by 1e-5", y);
    }

    public override void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient)
    {
        if (fault == "outer products overwrite")
        {
            Inner.Zero(gradient);
        }

        bool skip = fault == "outer products miss the first row" && u.Rows > 1;
        (u, x) = skip ? (u.Slice(1, u.Rows - 1), x.Slice(1, u.Rows - 1)) : (u, x);
        InOrder("outer products in ascending order", u.Rows, (start, count) =>
            Inner.AddOuter(u.Slice(start, count), x.Slice(start, count), scale, gradient));
    }

    public override void AddBias(TensorSlice y, DeviceTensor bias) =>
        Inner.AddBias(fault == "bias in the first row alone" && y.Rows > 1 ? y.Slice(0, 1) : y, bias);

    public override void AddColumnSums(TensorSlice dy, DeviceTensor gradient)
    {
        if (fault == "column sums overwrite")
        {
            Inner.Zero(gradient);
        }

        InOrder("column sums in ascending order", dy.Rows, (start, count) =>
            Inner.AddColumnSums(dy.Slice(start, count), gradient));
    }

    public override void ScaleColumns(TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate)
    {
        Inner.ScaleColumns(x, gain, y, accumulate && fault != "scaled columns overwrite");
        if (fault == "scaled columns by gain alone")
        {
            Inner.Add(y, x, y);
        }
    }

    public override void ScaleColumnsBackward(
        TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate)
    {
        if (fault == "gain gradient overwrites")
        {
            Inner.Zero(gradGain);
        }

        if (fault == "gain gradient of what it wrote")
        {
            Inner.ScaleColumnsBackward(x, dy, gain, Inner.Allocate(1, gain.Columns), dx, accumulate);
            Inner.ScaleColumnsBackward(x, dy, gain, gradGain, null, accumulate);
            return;
        }

        bool overwrite = fault == "scaled column gradient overwrites";
        TensorSlice? kept = fault == "scaled column gradient without dx" ? null : dx;
        InOrder("gain gradient in ascending order", x.Rows, (start, count) => Inner.ScaleColumnsBackward(
            x.Slice(start, count), dy.Slice(start, count), gain, gradGain, kept?.Slice(start, count), accumulate && !overwrite));
    }

    public override void CopyColumns(
        TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns)
    {
        int from = fault == "columns from one to the left" ? Math.Max(0, sourceColumn - 1) : sourceColumn;
        int count = fault == "columns but the last" ? Math.Max(0, columns - 1) : columns;
        Inner.CopyColumns(source, from, destination, destinationColumn, count);
        Quiet("column copy changes a NaN", destination);
    }

    public override void Relu(TensorSlice x, TensorSlice y)
    {
        if (fault == "relu leaks")
        {
            Change(y, Read(x), value => value <= 0 ? value * 1e-6f : value);
            return;
        }

        Inner.Relu(x, y);
        if (fault == "relu of a negative is -0")
        {
            Change(y, values => Array.ConvertAll(values, value => value == 0 ? -0f : value));
        }
    }

    public override void ReluBackward(TensorSlice y, TensorSlice dy, TensorSlice dx)
    {
        (float[] output, float[] gradient) = (Read(y), Read(dy));
        Inner.ReluBackward(y, dy, dx);
        if (fault == "relu gradient passes at zero")
        {
            Change(dx, values => [.. values.Select((value, i) => output[i] == 0 ? gradient[i] : value)]);
        }
    }

    public override void Silu(TensorSlice x, TensorSlice y)
    {
        Inner.Silu(x, y);
        Spoil("silu off by 1e-5", y);
    }

    public override void SiluBackward(TensorSlice x, TensorSlice dy, TensorSlice dx)
    {
        if (fault == "silu gradient of the result")
        {
            DeviceTensor y = Inner.Allocate(x.Rows, x.Columns);
            Inner.Silu(x, y);
            Inner.SiluBackward(y, dy, dx);
            return;
        }

        Inner.SiluBackward(x, dy, dx);
        Spoil("silu gradient off by 1e-5", dx);
    }

    public override void Pack(TensorSlice source, PackedFormat format, TensorSlice packed)
    {
        TensorSlice changed = source;
        if (fault == "packed BF16 truncated" && format == PackedFormat.BF16)
        {
            changed = Changed(
                source, value => BitConverter.UInt32BitsToSingle(BitConverter.SingleToUInt32Bits(value) & 0xFFFF0000));
        }

        if (fault == "sign bit of zero set" && format == PackedFormat.SignBits)
        {
            changed = Changed(source, value => value == 0 ? 1 : value);
        }

        if (fault == "sign bit of NaN set" && format == PackedFormat.SignBits)
        {
            changed = Changed(source, value => float.IsNaN(value) ? 1 : value);
        }

        Inner.Pack(changed, format, packed);
        if (packed.Rows > 1)
        {
            Quiet("packing depends on its company", packed);
        }
    }

    public override void Unpack(TensorSlice packed, PackedFormat format, TensorSlice destination)
    {
        Inner.Unpack(packed, format, destination);
        if (fault == "last column not unpacked")
        {
            Change(destination, values => [.. values.Select((value, i) => (i + 1) % destination.Columns == 0 ? 0 : value)]);
        }

        Quiet("unpacking spoils what it reads", packed);
    }

    // All rows at once, from the end; or one by one from the start, where that is the fault.
    private void InOrder(string when, int rows, Action<int, int> operation)
    {
        if (fault != when)
        {
            operation(0, rows);
            return;
        }

        for (int row = 0; row < rows; row++)
        {
            operation(row, 1);
        }
    }

    // As by way of arithmetic: every NaN becomes the same one.
    private void Quiet(string when, TensorSlice slice)
    {
        if (fault == when)
        {
            Change(slice, values => Array.ConvertAll(values, value => float.IsNaN(value) ? float.NaN : value));
        }
    }

    private TensorSlice Changed(TensorSlice source, Func<float, float> change)
    {
        TensorSlice copy = Inner.Allocate(source.Rows, source.Columns);
        Change(copy, Read(source), change);
        return copy;
    }

    private void Change(TensorSlice slice, float[] from, Func<float, float> change) =>
        Inner.Upload([.. from.Select(change)], slice);

    private void Change(TensorSlice slice, Func<float[], float[]> change) => Inner.Upload(change(Read(slice)), slice);

    private float[] Read(TensorSlice slice)
    {
        float[] values = new float[slice.Rows * slice.Columns];
        Inner.Download(slice, values);
        return values;
    }
}
