using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>Products with bypass matrices, all F32: BF16 rows are widened, and sums for BF16 rows rounded once.</summary>
internal static class FactorOps
{
    // Decode rows of so many adapters are multiplied together: of fewer the calls one by one are no more.
    private const int TogetherMin = 3;

    /// <summary>
    /// Temporaries of decode rows with adapters of their own: copies of a factor of each, x A^T and its product with B; with BF16 rows
    /// those that are read in F32, and on the host what libtorch brings to one type.
    /// </summary>
    public static long TogetherBytes(TorchContext context, long rows, long rank, long widest) => sizeof(float)
        * (Math.Min(rows * rank * widest, Math.Max(context.ElementsMax, rank * widest))
            + (rows * (rank + ((1 + context.WideCopies) * widest))));

    /// <summary>
    /// Temporaries of a call in bytes: x A^T, and the same of the gradient; with BF16 rows copies of those that are read, and the result.
    /// </summary>
    public static long ScratchBytes(TorchContext context, long rows, long rank, long widest, bool trains)
    {
        int sides = trains ? 2 : 1;
        return sizeof(float) * rows * ((sides * rank) + (context.WideCopies > 0 ? (sides + 1) * widest : 0));
    }

    public static void LoraForward(TorchContext context, TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y)
    {
        Check.That(x.Rows == y.Rows);
        for (int i = 0, next; i < segments.Length; i = next)
        {
            LoraSegment segment = segments[i];
            Check.That(x.Columns == segment.A.Wide && y.Columns == segment.BTransposed.Wide);
            Check.That(segment.A.Inner == segment.BTransposed.Inner);
            int count = CountTogether(context, segments[i..]);
            next = i + count;
            int rows = count * segment.RowCount;
            (TensorSlice from, TensorSlice to) = (x.Slice(segment.RowStart, rows), y.Slice(segment.RowStart, rows));
            if (rows == 0)
            {
                continue;
            }

            using DisposeScope scope = torch.NewDisposeScope();
            if (count > 1)
            {
                Together(context, from, segments[i..next], to);
                continue;
            }

            Tensor u = WideToRead(from).mm(TorchContext.Of(segment.A.Values).t());
            AddProduct(to, u, TorchContext.Of(segment.BTransposed.Values), accumulate: true, segment.Scale);
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

    // How many segments from the first on are multiplied together: those of one row each, one below the other, with adapters of one shape
    // and scale. One where they are too few.
    private static int CountTogether(TorchContext context, ReadOnlySpan<LoraSegment> segments)
    {
        LoraSegment first = segments[0];
        long elements = first.A.Inner * (long)Math.Max(first.A.Wide, first.BTransposed.Wide);
        long most = first.RowCount == 1 ? Math.Min(segments.Length, context.ElementsMax / elements) : 1;
        int count = 1;
        while (count < most && IsLike(segments[count], count))
        {
            count++;
        }

        return count < TogetherMin ? 1 : count;

        bool IsLike(in LoraSegment next, int row) => next.RowStart == first.RowStart + row && next.RowCount == 1
            && next.Scale == first.Scale && next.A.Inner == first.A.Inner && next.A.Wide == first.A.Wide
            && next.BTransposed.Inner == first.A.Inner && next.BTransposed.Wide == first.BTransposed.Wide;
    }

    // One product for all of them, of copies of their factors: on a GPU two calls an adapter and projection would take the host longer than
    // the device. No row meets another's factors, whatever is in those.
    private static void Together(TorchContext context, TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y)
    {
        (long count, long inner) = (segments.Length, segments[0].A.Inner);
        Tensor u;
        using (Tensor down = Below(segments, segment => segment.A))
        using (Tensor each = down.view(count, inner, x.Columns))
        {
            // A times the row as a column: libtorch copies what it is given turned, on the host.
            Tensor column = each.bmm(WideToRead(x).view(count, x.Columns, 1));
            u = column.view(count, 1, inner).mul_(context.Constant(segments[0].Scale));
        }

        Tensor up = Below(segments, segment => segment.BTransposed).view(count, inner, y.Columns);
        TorchContext.Store(u.bmm(up).view(y.Rows, y.Columns), TorchContext.Of(y), accumulate: true);
    }

    // A factor of each, one below the other.
    private static Tensor Below(ReadOnlySpan<LoraSegment> segments, Func<LoraSegment, DeviceFactor> factorOf)
    {
        Tensor[] factors = new Tensor[segments.Length];
        for (int i = 0; i < factors.Length; i++)
        {
            factors[i] = TorchContext.Of(factorOf(segments[i]).Values);
        }

        return torch.cat(factors);
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
