using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>Products with bypass matrices, all F32: BF16 rows are widened, and sums for BF16 rows rounded once.</summary>
internal static class FactorOps
{
    /// <summary>
    /// Temporaries of a call in bytes: x A^T, and the same of the gradient; with BF16 rows copies of those that are read, and the result.
    /// </summary>
    public static long ScratchBytes(TorchContext context, long rows, long rank, long widest, bool trains)
    {
        int sides = trains ? 2 : 1;
        return sizeof(float) * rows * ((sides * rank) + (context.WideCopies > 0 ? (sides + 1) * widest : 0));
    }

    public static void LoraForward(TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y)
    {
        Check.That(x.Rows == y.Rows);
        foreach (ref readonly LoraSegment segment in segments)
        {
            (DeviceFactor a, DeviceFactor b) = (segment.A, segment.BTransposed);
            Check.That(x.Columns == a.Wide && y.Columns == b.Wide && a.Inner == b.Inner);
            (TensorSlice from, TensorSlice to) =
                (x.Slice(segment.RowStart, segment.RowCount), y.Slice(segment.RowStart, segment.RowCount));
            if (segment.RowCount == 0)
            {
                continue;
            }

            using DisposeScope scope = torch.NewDisposeScope();
            Tensor u = WideToRead(from).mm(TorchContext.Of(a.Values).t());
            AddProduct(to, u, TorchContext.Of(b.Values), accumulate: true, segment.Scale);
        }
    }

    public static void LoraBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx)
    {
        Check.That(x.Rows == dy.Rows && x.Columns == a.Wide && dy.Columns == bTransposed.Wide && a.Inner == bTransposed.Inner);
        Check.That(gradA.Rows == a.Inner && gradA.Columns == a.Wide);
        Check.That(gradBTransposed.Rows == a.Inner && gradBTransposed.Columns == bTransposed.Wide);
        Check.That(dx is not TensorSlice slice || (slice.Rows == x.Rows && slice.Columns == x.Columns));
        if (x.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        (Tensor xs, Tensor dys) = (TorchContext.Wide(x), TorchContext.Wide(dy));
        (Tensor down, Tensor up) = (TorchContext.Of(a.Values), TorchContext.Of(bTransposed.Values));
        Tensor u = xs.mm(down.t());
        TorchContext.Of(gradBTransposed).addmm_(u.t(), dys, 1, scale);

        // Without the scale: it goes into the products below.
        Tensor du = dys.mm(up.t());
        TorchContext.Of(gradA).addmm_(du.t(), xs, 1, scale);
        if (dx is TensorSlice destination)
        {
            AddProduct(destination, du, down, accumulate: true, scale);
        }
    }

    public static void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate)
    {
        Check.That(x.Columns == m.Wide && u.Columns == m.Inner && x.Rows == u.Rows);
        if (x.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        AddProduct(u, WideToRead(x), TorchContext.Of(m.Values).t(), accumulate, scale);
    }

    public static void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate)
    {
        Check.That(u.Columns == m.Inner && y.Columns == m.Wide && u.Rows == y.Rows);
        if (u.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        AddProduct(y, TorchContext.Wide(u), TorchContext.Of(m.Values), accumulate, scale);
    }

    public static void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient)
    {
        Check.That(u.Rows == x.Rows && gradient.Rows == u.Columns && gradient.Columns == x.Columns);
        if (u.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        TorchContext.Of(gradient).addmm_(TorchContext.Wide(u).t(), TorchContext.Wide(x), 1, scale);
    }

    private static Tensor WideToRead(TensorSlice slice) => TorchContext.IsBf16(slice)
        ? TorchContext.ToRead(slice).to_type(torch.ScalarType.Float32)
        : TorchContext.ToRead(slice);

    // y (+)= scale * (a b), in the scope that is open.
    private static void AddProduct(TensorSlice y, Tensor a, Tensor b, bool accumulate, float scale)
    {
        Tensor result = TorchContext.Of(y);
        if (!TorchContext.IsBf16(y))
        {
            result.addmm_(a, b, accumulate ? 1 : 0, scale);
            return;
        }

        Tensor wide = result.to_type(torch.ScalarType.Float32);
        result.copy_(wide.addmm_(a, b, accumulate ? 1 : 0, scale));
    }
}
