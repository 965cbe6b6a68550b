using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// Gradient of attention for one window, by the formulas of <see cref="IComputeBackend.AttentionBackward"/>, at the keys and values that
/// the cache holds: where those were rounded, as the forward pass saw them.
/// </summary>
internal static class AttentionGradient
{
    /// <summary>
    /// Temporaries of a call in bytes: keys and values, and two gradients as large; three matrices of scores; queries, gradients and dQ.
    /// </summary>
    public static long ScratchBytes(TorchContext context, in ScratchLimits limits)
    {
        long positions = limits.Positions;
        long rows = AttentionOps.RowsMax(context, limits);
        long keys = sizeof(float) * positions * limits.KvHeads * limits.HeadDim;
        long numbers = 2 * sizeof(float) * rows * limits.QueryHeads;
        long products = (2 * keys) + numbers + AttentionOps.MaskBytes(rows) + (3 * sizeof(float) * rows * limits.QueryHeads * positions)
            + (4 * sizeof(float) * rows * limits.QueryHeads * limits.HeadDim) + (2 * AttentionOps.NarrowBytes(context, limits, rows));
        return (sizeof(long) * positions) + (2 * keys) + Math.Max(AttentionOps.StoredBytes(context, limits, positions), products);
    }

    public static void Run(
        TorchContext context, TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ,
        DeviceTensor dK, DeviceTensor dV)
    {
        (int start, int count) = (window.PositionStart, window.RowCount);
        HeadLayout heads = HeadLayout.Of(window, q.Columns);
        Check.That(q.Rows == count && dO.Rows == count && dQ.Rows == count);
        Check.That(dO.Columns == q.Columns && dQ.Columns == q.Columns);
        Check.That(dK.Rows >= start + count && dK.Columns == heads.KvHeads * heads.HeadDim);
        Check.That(dV.Rows >= start + count && dV.Columns == dK.Columns);
        Check.That(window.LogSumExp is not null && window.LogSumExp.Columns == heads.QueryHeads);
        if (count == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        (Tensor keys, Tensor values) = AttentionOps.Gather(context, window, layer, start + count);
        Tensor valuesTurned = values.transpose(1, 2);
        Scalar scale = context.Constant(heads.Scale);
        int chunk = context.RowsPerPiece((long)heads.QueryHeads * (start + count));
        for (int last = count; last > 0; last -= chunk)
        {
            using DisposeScope inner = torch.NewDisposeScope();
            int first = Math.Max(0, last - chunk);
            (int rows, int end) = (last - first, start + last);
            Tensor prefix = keys.narrow(1, 0, end);
            Tensor queries = heads.Split(q.Slice(first, rows)).mul(scale);
            Tensor gradients = heads.Split(dO.Slice(first, rows));
            Tensor logSums = TorchContext.Of(window.LogSumExp.Slice(start + first, rows))
                .view(rows, heads.KvHeads, heads.Group).permute(1, 0, 2).reshape(heads.KvHeads, (long)rows * heads.Group, 1);

            // Scores that a row may not see are finite or overflow in exp; either way their P is set to zero.
            Tensor p = queries.bmm(prefix.transpose(1, 2)).sub_(logSums).exp_();
            AttentionOps.Mask(context, p, heads, rows, end, TorchContext.Zero);
            AddToPrefix(p.transpose(1, 2).bmm(gradients), dV, heads, end);

            Tensor dP = gradients.bmm(valuesTurned.narrow(2, 0, end));
            Tensor mean = p.mul(dP).sum(-1L, keepdim: true);
            Tensor dS = dP.sub_(mean).mul_(p);
            heads.Join(dS.bmm(prefix).mul_(scale), dQ.Slice(first, rows));

            // The queries carry the scale already.
            AddToPrefix(dS.transpose(1, 2).bmm(queries), dK, heads, end);
        }
    }

    // accumulator [positions, KV heads * head dimension] += gradient [KV heads, end, head dimension] in its first rows.
    private static void AddToPrefix(Tensor gradient, DeviceTensor accumulator, in HeadLayout heads, int end) =>
        TorchContext.Of(accumulator.Slice(0, end)).view(end, heads.KvHeads, heads.HeadDim)
            .add_(gradient.permute(1, 0, 2), TorchContext.One);
}
