using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>Operations that treat each row by itself: norms and rotation.</summary>
internal static class RowOps
{
    private static readonly long[] LastDimension = [-1];
    private static readonly long[] Halves = [2];

    /// <summary>
    /// Temporaries of a norm in bytes: two numbers a group; of BF16 rows a copy in F32 and the result; backward three products, and copies
    /// of BF16 rows.
    /// </summary>
    public static long NormBytes(TorchContext context, long rows, long columns, long groups, bool trains)
    {
        int copies = trains ? 3 + context.WideCopies : context.WideCopies > 0 ? 2 : 0;
        return rows * sizeof(float) * ((copies * columns) + (2 * groups));
    }

    /// <summary>Temporaries of a rotation in bytes: the halves of each head the other way round; copies of BF16 rows; positions.</summary>
    public static long RopeBytes(TorchContext context, long rows, long columns) =>
        rows * ((sizeof(float) * (1 + context.WideCopies) * columns) + sizeof(long));

    public static void RmsNorm(TorchContext context, TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y)
    {
        Check.That(gain.Rows == 1 && x.Columns % gain.Columns == 0);
        Check.That(x.Rows == y.Rows && x.Columns == y.Columns);
        if (x.Rows == 0)
        {
            return;
        }

        // x / sqrt(mean(x^2) + e) = sqrt(n) x / hypot(|x|, sqrt(n e)): fewer calls than by squares, each of which costs a GPU's host
        // several microseconds. Without a scope, which costs as much as a small operation.
        (Tensor groups, Tensor result) = (Groups(x, gain), Groups(y, gain));
        bool isNarrow = TorchContext.IsBf16(x) || TorchContext.IsBf16(y);
        using Tensor? copy = isNarrow ? groups.to_type(torch.ScalarType.Float32, copy: true) : null;
        Tensor values = copy ?? groups;
        using Tensor norms = values.norm(1, keepdim: true);
        using Tensor lengths = norms.hypot(context.Number(Math.Sqrt((double)epsilon * gain.Columns)));
        bool isInPlace = TorchContext.IsSame(x, y);

        // The root goes where it costs no element a rounding: a power of two into the division, another one into the lengths before.
        double root = Math.Sqrt(gain.Columns);
        Scalar scale = context.Constant(root);
        if (isInPlace || !double.IsPow2(root))
        {
            lengths.mul_(context.Constant(1 / root));
            scale = TorchContext.One;
        }

        if (isNarrow)
        {
            using Tensor normed = context.Number(0).addcdiv(values, lengths, scale);
            result.copy_(normed.mul_(TorchContext.Of(gain)));
        }
        else if (isInPlace)
        {
            result.div_(lengths).mul_(TorchContext.Of(gain));
        }
        else
        {
            result.fill_(TorchContext.Zero).addcdiv_(groups, lengths, scale).mul_(TorchContext.Of(gain));
        }
    }

    public static void RmsNormBackward(
        TorchContext context, TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate)
    {
        Check.That(gain.Rows == 1 && x.Columns % gain.Columns == 0);
        Check.That(x.Rows == dy.Rows && x.Columns == dy.Columns && x.Rows == dx.Rows && x.Columns == dx.Columns);
        if (x.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        Tensor groups = TorchContext.Wide(x, GroupsOf(x, gain));
        Tensor r = InverseRms(context, groups, epsilon);

        // dx = r * g - x * r^3 * mean(g * x), g = dy * gain.
        Tensor g = Groups(dy, gain).mul(TorchContext.Of(gain));
        Tensor slope = g.mul(groups).mean(LastDimension, keepdim: true).mul_(r).mul_(r).mul_(r);
        Tensor result = g.mul_(r).addcmul_(groups, slope, TorchContext.MinusOne);
        TorchContext.Store(result, Groups(dx, gain), accumulate);
    }

    public static void Rope(TorchContext context, TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse)
    {
        Check.That(positions.Length == x.Rows && x.Columns % table.Columns == 0 && table.Columns % 2 == 0);
        using DisposeScope scope = torch.NewDisposeScope();
        Tensor indices = context.Indices(positions, table.Rows);
        if (x.Rows == 0)
        {
            return;
        }

        (int headDim, int half) = (table.Columns, table.Columns / 2);
        Tensor[] angles = context.Results(indices, table, inverse, Angles);
        Tensor heads = TorchContext.Of(x, new ViewShape(x.Rows, x.Columns / headDim, 2, half, x.Columns, headDim, half));
        Tensor swapped = heads.flip(Halves);
        if (TorchContext.IsBf16(x))
        {
            // libtorch's addcmul_ takes one type alone; the cosines and sines stay F32.
            heads.mul_(angles[0]).add_(swapped.mul(angles[1]), TorchContext.One);
        }
        else
        {
            heads.mul_(angles[0]).addcmul_(swapped, angles[1], TorchContext.One);
        }
    }

    /// <summary>
    /// Bytes of what is kept of angles: cosines, and sines with both signs, of the rows of a step and of a backward item.
    /// </summary>
    public static long AnglesBytes(long rows, long headDim) => KeptResults.Count * sizeof(float) * rows * 2 * headDim;

    // Cosines [rows, 1, 1, half], and what the other half of a head counts for in either half, [rows, 1, 2, half].
    private static Tensor[] Angles(Tensor positions, DeviceTensor table, bool inverse)
    {
        int half = table.Columns / 2;
        Tensor angles = TorchContext.Of(table).index_select(0, positions).view(-1, 2, half);
        Tensor sines = angles.narrow(1, 1, 1);
        Tensor both = angles.mul(TorchContext.Zero);
        (int plus, int minus) = inverse ? (0, 1) : (1, 0);
        both.narrow(1, plus, 1).copy_(sines);
        both.narrow(1, minus, 1).copy_(sines).mul_(TorchContext.MinusOne);
        return [angles.view(-1, 1, 2, half).narrow(2, 0, 1), both.view(-1, 1, 2, half)];
    }

    // [rows * groups, columns of a group].
    private static Tensor Groups(TensorSlice slice, DeviceTensor gain) => TorchContext.Of(slice, GroupsOf(slice, gain));

    private static ViewShape GroupsOf(TensorSlice slice, DeviceTensor gain) =>
        ViewShape.Matrix((long)slice.Rows * (slice.Columns / gain.Columns), gain.Columns);

    private static Tensor InverseRms(TorchContext context, Tensor groups, float epsilon) =>
        groups.mul(groups).mean(LastDimension, keepdim: true).add_(context.Constant(epsilon), TorchContext.One).rsqrt_();
}
