using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// Operations element by element. A destination may be any of the sources: results are made there where that harms none, and aside
/// elsewhere.
/// </summary>
internal static class ElementwiseOps
{
    /// <summary>
    /// Temporaries of a call in bytes: two gradients of a gate, or one result made aside; with BF16 rows as many copies of them.
    /// </summary>
    public static long ScratchBytes(TorchContext context, long rows, long columns, bool trains) =>
        sizeof(float) * (trains ? 2 : 1) * (context.WideCopies > 0 ? 2 : 1) * rows * columns;

    public static void Copy(TensorSlice source, TensorSlice destination)
    {
        CheckSame(source, destination);
        if (source.Tensor is TorchPacked packed)
        {
            packed.CopyRows(source.Start, source.Rows, (TorchPacked)destination.Tensor, destination.Start);
        }
        else if (source.Rows > 0)
        {
            TorchContext.Of(destination).copy_(TorchContext.Of(source));
        }
    }

    public static void Zero(TensorSlice destination)
    {
        if (destination.Rows > 0)
        {
            TorchContext.Of(destination).fill_(TorchContext.Zero);
        }
    }

    public static void Add(TensorSlice a, TensorSlice b, TensorSlice y)
    {
        CheckSame(a, b);
        CheckSame(a, y);
        if (a.Rows > 0)
        {
            Tensor sum = TorchContext.Of(y);
            if (TorchContext.IsSame(b, y))
            {
                (a, b) = (b, a);
            }

            if (!TorchContext.IsSame(a, y))
            {
                sum.copy_(TorchContext.Of(a));
            }

            sum.add_(TorchContext.Of(b), TorchContext.One);
        }
    }

    // NaN is not below zero, and stays; minus zero becomes zero.
    public static void Relu(TorchContext context, TensorSlice x, TensorSlice y)
    {
        CheckSame(x, y);
        if (x.Rows > 0)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            Tensor values = TorchContext.Of(x);
            Tensor mask = values.le(TorchContext.Zero);
            TorchContext.Of(y).copy_(values).masked_fill_(mask, TorchContext.Zero);
        }
    }

    public static void ReluBackward(TorchContext context, TensorSlice y, TensorSlice dy, TensorSlice dx)
    {
        CheckSame(y, dy);
        CheckSame(y, dx);
        if (y.Rows > 0)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            Tensor zero = torch.zeros(1L, 1L, TorchContext.ScalarTypeOf(dy.Tensor.Type), context.Device);
            TorchContext.Of(dx).copy_(TorchContext.Of(dy).where(TorchContext.Of(y).gt(TorchContext.Zero), zero));
        }
    }

    public static void Silu(TensorSlice x, TensorSlice y)
    {
        CheckSame(x, y);
        if (x.Rows > 0)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            Tensor values = TorchContext.Wide(x);
            TorchContext.Of(y).copy_(values.sigmoid().mul_(values));
        }
    }

    public static void SiluBackward(TorchContext context, TensorSlice x, TensorSlice dy, TensorSlice dx)
    {
        CheckSame(x, dy);
        CheckSame(x, dx);
        if (x.Rows > 0)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            Tensor values = TorchContext.Wide(x);
            Tensor slope = Slope(context, values, values.sigmoid());
            TorchContext.Of(dx).copy_(slope.mul_(TorchContext.Of(dy)));
        }
    }

    public static void SiluGate(TensorSlice gate, TensorSlice up, TensorSlice y)
    {
        CheckSame(gate, up);
        CheckSame(gate, y);
        if (gate.Rows > 0)
        {
            (Tensor gates, Tensor product) = (TorchContext.Of(gate), TorchContext.Of(y));
            if (TorchContext.IsSame(up, y))
            {
                using Tensor factor = gates.silu();
                product.mul_(factor);
                return;
            }

            if (!TorchContext.IsSame(gate, y))
            {
                product.copy_(gates);
            }

            product.silu_().mul_(TorchContext.Of(up));
        }
    }

    public static void SiluGateBackward(
        TorchContext context, TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp)
    {
        CheckSame(gate, up);
        CheckSame(gate, dy);
        CheckSame(gate, dGate);
        CheckSame(gate, dUp);
        if (gate.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        (Tensor gates, Tensor gradients) = (TorchContext.Wide(gate), TorchContext.Of(dy));
        Tensor s = gates.sigmoid();
        Tensor newDGate = Slope(context, gates, s).mul_(gradients).mul_(TorchContext.Of(up));
        Tensor newDUp = s.mul_(gates).mul_(gradients);
        TorchContext.Of(dGate).copy_(newDGate);
        TorchContext.Of(dUp).copy_(newDUp);
    }

    // s * (1 + x * (1 - s)), s = sigmoid(x): a new tensor.
    private static Tensor Slope(TorchContext context, Tensor x, Tensor s) =>
        s.mul(TorchContext.MinusOne).add_(TorchContext.One).mul_(x).add_(TorchContext.One).mul_(s);

    private static void CheckSame(TensorSlice a, TensorSlice b) => Check.That(a.Rows == b.Rows && a.Columns == b.Columns);
}
