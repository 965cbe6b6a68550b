using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>Operations that treat each row by itself: norms and rotation.</summary>
internal static class RowOps
{
    private static readonly long[] LastDimension = [-1];

    /// <summary>
    /// Temporaries of a norm in bytes: squares, result and, backward, one product more; two numbers a group. A rotation has less: its
    /// angles, and the halves.
    /// </summary>
    public static long ScratchBytes(long rows, long columns, long groups, bool trains) =>
        rows * ((sizeof(float) * (trains ? 3 : 2) * columns) + (2 * sizeof(float) * groups) + sizeof(long));

    public static void RmsNorm(TorchContext context, TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y)
    {
        Check.That(gain.Rows == 1 && x.Columns % gain.Columns == 0);
        Check.That(x.Rows == y.Rows && x.Columns == y.Columns);
        if (x.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        Tensor groups = Groups(x, gain);
        Tensor result = groups.mul(InverseRms(context, groups, epsilon)).mul_(TorchContext.Of(gain));
        Groups(y, gain).copy_(result);
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
        Tensor groups = Groups(x, gain);
        Tensor r = InverseRms(context, groups, epsilon);

        // dx = r * g - x * r^3 * mean(g * x), g = dy * gain.
        Tensor g = Groups(dy, gain).mul(TorchContext.Of(gain));
        Tensor slope = g.mul(groups).mean(LastDimension, keepdim: true).mul_(r).mul_(r).mul_(r);
        Tensor result = g.mul_(r).addcmul_(groups, slope, context.MinusOne);
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
        Tensor angles = TorchContext.Of(table).index_select(0, indices).view(x.Rows, 1, headDim);
        (Tensor cos, Tensor sin) = (angles.narrow(2, 0, half), angles.narrow(2, half, half));
        Tensor heads = TorchContext.Of(x).view(x.Rows, x.Columns / headDim, headDim);
        (Tensor first, Tensor second) = (heads.narrow(2, 0, half), heads.narrow(2, half, half));
        (Scalar forward, Scalar backward) = inverse ? (context.MinusOne, context.One) : (context.One, context.MinusOne);
        Tensor newFirst = first.mul(cos).addcmul_(second, sin, backward);
        Tensor newSecond = second.mul(cos).addcmul_(first, sin, forward);
        first.copy_(newFirst);
        second.copy_(newSecond);
    }

    // [rows * groups, columns of a group].
    private static Tensor Groups(TensorSlice slice, DeviceTensor gain) => TorchContext.Of(slice).view(-1, gain.Columns);

    private static Tensor InverseRms(TorchContext context, Tensor groups, float epsilon) =>
        groups.mul(groups).mean(LastDimension, keepdim: true).add_(context.Constant(epsilon)).rsqrt_();
}
