using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>Operations between a matrix and one number a column, and copies of columns.</summary>
internal static class ColumnOps
{
    /// <summary>Temporaries of a call in bytes: a product of the gradient, and one of the input; copies of BF16 rows.</summary>
    public static long ScratchBytes(TorchContext context, long rows, long columns, bool trains) =>
        sizeof(float) * columns * ((context.WideCopies * rows) + (trains ? (2 * rows) + 3 : rows + 1));

    public static void AddBias(TensorSlice y, DeviceTensor bias)
    {
        CheckRow(bias, y);
        if (y.Rows > 0)
        {
            TorchContext.Of(y).add_(TorchContext.Of(bias), TorchContext.One);
        }
    }

    public static void AddColumnSums(TensorSlice dy, DeviceTensor gradient)
    {
        CheckRow(gradient, dy);
        if (dy.Rows > 0)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            TorchContext.Of(gradient).add_(TorchContext.Wide(dy).sum(0L, keepdim: true), TorchContext.One);
        }
    }

    public static void Scale(TorchContext context, TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate)
    {
        CheckRow(gain, x);
        Check.That(x.Rows == y.Rows && x.Columns == y.Columns);
        if (x.Rows > 0)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            TorchContext.Store(TorchContext.Of(x).mul(TorchContext.Of(gain).sub(TorchContext.One)), TorchContext.Of(y), accumulate);
        }
    }

    public static void ScaleBackward(
        TorchContext context, TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx,
        bool accumulate)
    {
        CheckRow(gain, x);
        CheckRow(gradGain, x);
        Check.That(x.Rows == dy.Rows && x.Columns == dy.Columns);
        Check.That(dx is not TensorSlice slice || (slice.Rows == x.Rows && slice.Columns == x.Columns));
        if (x.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        Tensor dys = TorchContext.Of(dy);
        TorchContext.Of(gradGain).add_(TorchContext.Wide(x).mul(dys).sum(0L, keepdim: true), TorchContext.One);
        if (dx is TensorSlice destination)
        {
            TorchContext.Store(dys.mul(TorchContext.Of(gain).sub(TorchContext.One)), TorchContext.Of(destination), accumulate);
        }
    }

    public static void Copy(TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns)
    {
        Check.That(source.Rows == destination.Rows && columns >= 0 && sourceColumn >= 0 && destinationColumn >= 0);
        Check.That(sourceColumn + columns <= source.Columns && destinationColumn + columns <= destination.Columns);
        if (source.Rows > 0 && columns > 0)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            Tensor from = TorchContext.Of(source).narrow(1, sourceColumn, columns);
            TorchContext.Of(destination).narrow(1, destinationColumn, columns).copy_(from);
        }
    }

    private static void CheckRow(DeviceTensor row, TensorSlice matrix) =>
        Check.That(row.Rows == 1 && row.Columns == matrix.Columns);
}
