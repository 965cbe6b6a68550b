using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>Products with bypass matrices, all F32.</summary>
internal static class FactorOps
{
    /// <summary>Temporaries of a call in bytes: x A^T, and the same of the gradient.</summary>
    public static long ScratchBytes(long rows, long rank, bool trains) => sizeof(float) * (trains ? 2 : 1) * rows * rank;

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
            Tensor u = TorchContext.ToRead(from).mm(TorchContext.Of(a.Values).t());
            TorchContext.Of(to).addmm_(u, TorchContext.Of(b.Values), 1, segment.Scale);
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
        (Tensor xs, Tensor dys) = (TorchContext.Of(x), TorchContext.Of(dy));
        (Tensor down, Tensor up) = (TorchContext.Of(a.Values), TorchContext.Of(bTransposed.Values));
        Tensor u = xs.mm(down.t());
        TorchContext.Of(gradBTransposed).addmm_(u.t(), dys, 1, scale);

        // Without the scale: it goes into the products below.
        Tensor du = dys.mm(up.t());
        TorchContext.Of(gradA).addmm_(du.t(), xs, 1, scale);
        if (dx is TensorSlice destination)
        {
            TorchContext.Of(destination).addmm_(du, down, 1, scale);
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
        TorchContext.Of(u).addmm_(TorchContext.ToRead(x), TorchContext.Of(m.Values).t(), accumulate ? 1 : 0, scale);
    }

    public static void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate)
    {
        Check.That(u.Columns == m.Inner && y.Columns == m.Wide && u.Rows == y.Rows);
        if (u.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        TorchContext.Of(y).addmm_(TorchContext.Of(u), TorchContext.Of(m.Values), accumulate ? 1 : 0, scale);
    }

    public static void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient)
    {
        Check.That(u.Rows == x.Rows && gradient.Rows == u.Columns && gradient.Columns == x.Columns);
        if (u.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        TorchContext.Of(gradient).addmm_(TorchContext.Of(u).t(), TorchContext.Of(x), 1, scale);
    }
}
