using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>Products with frozen weights.</summary>
/// <remarks>
/// Products are mm and addmm_, never matmul: TorchSharp's native part lets an error in matmul end the process.
/// </remarks>
internal static class LinearOps
{
    private const int BF16Bytes = 2;

    /// <summary>
    /// Temporaries of a product of so many rows with a BF16 weight, in bytes; one with an F32 weight has none. On the host the weight in
    /// F32, on a GPU input and result in BF16.
    /// </summary>
    public static long ScratchBytes(TorchContext context, long rows, long outFeatures, long inFeatures) => context.OnHost
        ? sizeof(float) * outFeatures * inFeatures
        : BF16Bytes * rows * (outFeatures + inFeatures);

    /// <summary>Temporaries of a gather in bytes: ids, and rows as they are stored.</summary>
    public static long GatherBytes(long rows, long columns) => rows * (sizeof(long) + (sizeof(float) * columns));

    public static void Gather(TorchContext context, DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y)
    {
        Check.That(y.Rows == ids.Length && y.Columns == table.InFeatures);
        using DisposeScope scope = torch.NewDisposeScope();
        Tensor indices = context.Indices(ids, table.OutFeatures);
        if (ids.Length > 0)
        {
            TorchContext.Of(y).copy_(((TorchWeight)table).Values.index_select(0, indices));
        }
    }

    public static void Forward(
        TorchContext context, TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate)
    {
        Check.That(x.Columns == weight.InFeatures && y.Columns == weight.OutFeatures && x.Rows == y.Rows);
        Check.That(bias is null || (bias.Rows == 1 && bias.Columns == weight.OutFeatures));
        if (x.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        Tensor result = TorchContext.Of(y);
        Multiply(TorchContext.Of(x), Operand(context, weight).t(), result, accumulate);
        if (bias is not null)
        {
            result.add_(TorchContext.Of(bias));
        }
    }

    public static void BackwardInput(TorchContext context, TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate)
    {
        Check.That(dy.Columns == weight.OutFeatures && dx.Columns == weight.InFeatures && dy.Rows == dx.Rows);
        if (dy.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        Multiply(TorchContext.Of(dy), Operand(context, weight), TorchContext.Of(dx), accumulate);
    }

    /// <summary>
    /// W as products take it. On the host a BF16 weight is widened for the call, because libtorch's BF16 products there are slow or
    /// round their result; the copy is as large as an F32 weight and gone after the call. On a GPU it stays BF16.
    /// </summary>
    public static Tensor Operand(TorchContext context, DeviceWeight weight)
    {
        Tensor values = ((TorchWeight)weight).Values;
        return weight.Type == DType.BF16 && context.OnHost ? values.to_type(torch.ScalarType.Float32) : values;
    }

    /// <summary>
    /// y (+)= x m. F32 where <paramref name="m"/> is. A BF16 matrix takes a BF16 copy of x: the GPU sums in F32 and rounds the result
    /// to BF16 once, before it is widened or added; the managed API has no product of BF16 operands with an F32 result.
    /// </summary>
    public static void Multiply(Tensor x, Tensor m, Tensor y, bool accumulate)
    {
        if (m.dtype != torch.ScalarType.BFloat16)
        {
            y.addmm_(x, m, accumulate ? 1 : 0);
        }
        else
        {
            TorchContext.Store(x.to_type(torch.ScalarType.BFloat16).mm(m), y, accumulate);
        }
    }

    /// <summary>x m, F32, as <see cref="Multiply"/> computes it.</summary>
    public static Tensor Product(Tensor x, Tensor m) => m.dtype == torch.ScalarType.BFloat16
        ? x.to_type(torch.ScalarType.BFloat16).mm(m).to_type(torch.ScalarType.Float32)
        : x.mm(m);
}
