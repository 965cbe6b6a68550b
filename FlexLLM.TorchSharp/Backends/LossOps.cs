using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>Logits of chosen rows, and the head fused with cross-entropy.</summary>
internal static class LossOps
{
    /// <summary>Temporaries of logits in bytes: chosen rows, and those of the product.</summary>
    public static long LogitsBytes(TorchContext context, long rows, long vocabulary, long columns) =>
        LinearOps.GatherBytes(rows, columns) + LinearOps.ScratchBytes(context, rows, vocabulary, columns)
            + WideBytes(context, rows, columns);

    /// <summary>
    /// Temporaries of the fused loss in bytes: of a piece of rows the logits and what logsumexp makes of them, the chosen rows and their
    /// gradient, six numbers a row; with a BF16 head those of both products, which on a GPU also exist once more in F32.
    /// </summary>
    public static long CrossEntropyBytes(TorchContext context, long rows, long vocabulary, long columns)
    {
        long piece = Math.Min(rows, context.RowsPerPiece(vocabulary));
        long products = LinearOps.ScratchBytes(context, piece, vocabulary, columns) * (context.MultipliesBf16 ? 2 : 1);
        return (2 * sizeof(float) * piece * (vocabulary + columns)) + (6 * sizeof(long) * piece) + products
            + (2 * WideBytes(context, piece, columns));
    }

    // Chosen rows in the other type.
    private static long WideBytes(TorchContext context, long rows, long columns) =>
        context.WideCopies == 0 ? 0 : sizeof(float) * rows * columns;

    public static void Logits(TorchContext context, TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits)
    {
        Check.That(logits.Rows == rows.Length && logits.Columns == head.OutFeatures && x.Columns == head.InFeatures);
        using DisposeScope scope = torch.NewDisposeScope();
        Tensor indices = context.Indices(rows, x.Rows);
        if (rows.Length > 0)
        {
            Tensor chosen = TorchContext.Of(x).index_select(0, indices);
            LinearOps.Multiply(chosen, x.Tensor.Type, LinearOps.Operand(context, head).t(), TorchContext.Of(logits));
        }
    }

    public static void CrossEntropy(
        TorchContext context, TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx,
        TensorSlice losses)
    {
        Check.That(targets.Length == x.Rows && dx.Rows == x.Rows && losses.Rows == x.Rows && losses.Columns == 1);
        Check.That(x.Columns == head.InFeatures && dx.Columns == x.Columns);
        Check.That(targets.IndexOfAnyInRange(head.OutFeatures, int.MaxValue) < 0);
        ElementwiseOps.Zero(losses);
        ElementwiseOps.Zero(dx);
        int[] live = new int[targets.Length];
        int count = 0;
        for (int row = 0; row < targets.Length; row++)
        {
            if (targets[row] >= 0)
            {
                live[count++] = row;
            }
        }

        if (count == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        Tensor matrix = LinearOps.Operand(context, head);
        int chunk = Math.Min(context.RowsPerPiece(head.OutFeatures), count);
        int[] labels = new int[chunk];
        for (int first = 0; first < count; first += chunk)
        {
            ReadOnlySpan<int> rows = live.AsSpan(first, Math.Min(chunk, count - first));
            for (int i = 0; i < rows.Length; i++)
            {
                labels[i] = targets[rows[i]];
            }

            RunChunk(context, x, rows, labels.AsSpan(0, rows.Length), matrix, gradientScale, dx, losses);
        }
    }

    private static void RunChunk(
        TorchContext context, TensorSlice x, ReadOnlySpan<int> rows, ReadOnlySpan<int> labels, Tensor head, float gradientScale,
        TensorSlice dx, TensorSlice losses)
    {
        using DisposeScope scope = torch.NewDisposeScope();
        Tensor rowIndices = context.Indices(rows, x.Rows);
        Tensor targets = context.Indices(labels, int.MaxValue).view(labels.Length, 1);
        Tensor logits = LinearOps.Product(TorchContext.Of(x).index_select(0, rowIndices), x.Tensor.Type, head.t());
        Tensor logSum = logits.logsumexp(1, keepdim: true);
        TorchContext.Of(losses).index_copy_(0, rowIndices, logSum.sub(logits.gather(1, targets)));

        // gradientScale * (softmax - onehot).
        using Scalar scale = TorchContext.Passing(gradientScale);
        using Scalar minusScale = TorchContext.Passing(-gradientScale);
        Tensor gradient = logits.sub_(logSum).exp_().mul_(scale);
        Tensor ones = torch.ones(labels.Length, 1L, torch.ScalarType.Float32, context.Device);
        gradient.scatter_add_(1, targets, ones.mul_(minusScale));
        Tensor product = LinearOps.Product(gradient, DType.F32, head);
        TorchContext.Of(dx).index_copy_(
            0, rowIndices, TorchContext.IsBf16(dx) ? product.to_type(torch.ScalarType.BFloat16) : product);
    }
}
