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
    public static long ScratchBytes(TorchContext context, long rows, long outFeatures, long inFeatures) => context.MultipliesBf16
        ? BF16Bytes * rows * (outFeatures + inFeatures)
        : sizeof(float) * outFeatures * inFeatures;

    /// <summary>
    /// What comes to it with BF16 rows, where W is multiplied as F32: input and result in F32, and what is made of the result.
    /// </summary>
    public static long WideBytes(TorchContext context, long rows, long outFeatures, long inFeatures) => context.WideCopies == 0
        ? 0
        : sizeof(float) * rows * (outFeatures + inFeatures + ((context.WideCopies - 1) * Math.Max(outFeatures, inFeatures)));

    /// <summary>What stays of it for the products to come: see <see cref="SharedRounding"/>.</summary>
    public static long RoundedBytes(TorchContext context, long rows, long inFeatures) =>
        context.MultipliesBf16 && context.ActivationType == DType.F32 ? BF16Bytes * rows * inFeatures : 0;

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

        Multiply(context, x, (TorchWeight)weight, turned: true, y, accumulate);
        if (bias is not null)
        {
            TorchContext.Of(y).add_(TorchContext.Of(bias), TorchContext.One);
        }
    }

    public static void BackwardInput(TorchContext context, TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate)
    {
        Check.That(dy.Columns == weight.OutFeatures && dx.Columns == weight.InFeatures && dy.Rows == dx.Rows);
        if (dy.Rows == 0)
        {
            return;
        }

        Multiply(context, dy, (TorchWeight)weight, turned: false, dx, accumulate);
    }

    /// <summary>
    /// W as products take it. On the host a BF16 weight is widened for the call, because libtorch's BF16 products there are slow or
    /// round their result; the copy is as large as an F32 weight and gone after the call. On a GPU it stays BF16.
    /// </summary>
    public static Tensor Operand(TorchContext context, DeviceWeight weight)
    {
        Tensor values = ((TorchWeight)weight).Values;
        return weight.Type == DType.BF16 && !context.MultipliesBf16 ? values.to_type(torch.ScalarType.Float32) : values;
    }

    /// <summary>
    /// y (+)= x W, or x W^T where <paramref name="turned"/>. F32 where W is. On a GPU a BF16 matrix takes a BF16 copy of x: the GPU sums in
    /// F32 and rounds the result to BF16 before it is widened or added (<see cref="TorchContext.MultipliesBf16"/>); the managed API has no
    /// product of BF16 operands with an F32 result.
    /// </summary>
    /// <remarks>Each temporary is disposed by itself: a scope costs as much as a small operation, and a layer has seven of these.</remarks>
    private static void Multiply(TorchContext context, TensorSlice x, TorchWeight weight, bool turned, TensorSlice y, bool accumulate)
    {
        (Tensor m, Tensor result) = (turned ? weight.Turned : weight.Values, TorchContext.Of(y));
        if (weight.Type != DType.BF16)
        {
            MultiplyF32(x, m, y, result, accumulate);
        }
        else if (!context.MultipliesBf16)
        {
            using Tensor widened = m.to_type(torch.ScalarType.Float32);
            MultiplyF32(x, widened, y, result, accumulate);
        }
        else if (TorchContext.IsBf16(y))
        {
            // What is in y already is part of the sum, which is rounded once.
            result.addmm_(TorchContext.Rounded(x), m, accumulate ? 1 : 0);
        }
        else
        {
            using Tensor product = TorchContext.Rounded(x).mm(m);
            TorchContext.Store(product, result, accumulate);
        }
    }

    // With an F32 matrix; libtorch's products take operands and results of one type.
    private static void MultiplyF32(TensorSlice x, Tensor m, TensorSlice y, Tensor result, bool accumulate)
    {
        if (!TorchContext.IsBf16(x) && !TorchContext.IsBf16(y))
        {
            result.addmm_(TorchContext.Of(x), m, accumulate ? 1 : 0);
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        TorchContext.Store(TorchContext.Wide(x).mm(m), result, accumulate);
    }

    /// <summary>y = x m for F32 y and rows of some type that nobody else multiplies, in the scope that is open.</summary>
    public static void Multiply(Tensor x, DType type, Tensor m, Tensor y)
    {
        if (m.dtype == torch.ScalarType.BFloat16)
        {
            y.copy_(x.to_type(torch.ScalarType.BFloat16).mm(m));
        }
        else
        {
            y.addmm_(type == DType.F32 ? x : x.to_type(torch.ScalarType.Float32), m, 0);
        }
    }

    /// <summary>x m, F32, as <see cref="Multiply(Tensor, DType, Tensor, Tensor)"/> computes it.</summary>
    public static Tensor Product(Tensor x, DType type, Tensor m) => m.dtype == torch.ScalarType.BFloat16
        ? x.to_type(torch.ScalarType.BFloat16).mm(m).to_type(torch.ScalarType.Float32)
        : (type == DType.F32 ? x : x.to_type(torch.ScalarType.Float32)).mm(m);
}
