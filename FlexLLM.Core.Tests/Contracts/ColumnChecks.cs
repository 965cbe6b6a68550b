using FlexLLM.Backends;

namespace FlexLLM.Tests.Contracts;

/// <summary>Operations between a matrix and one number a column, and copies of columns.</summary>
internal static class ColumnChecks
{
    public static void AddBias(IComputeBackend backend, int rows, int columns)
    {
        using var bench = new Workbench(backend);
        (Matrix y, Matrix bias) = (bench.Random(rows, columns), bench.Random(1, columns));
        Operand target = bench.Target(y);
        backend.AddBias(target, bench.Constant(bias));
        Expect.SameBits("bias", target.Read(), Reference.AddBias(y, bias).Rounded(DType.F32));
        bench.Verify();
    }

    public static void AddColumnSums(IComputeBackend backend, int rows, int columns)
    {
        using var bench = new Workbench(backend);
        (Matrix dy, Matrix before) = (bench.Random(rows, columns), bench.Random(1, columns));
        Operand gradient = bench.Accumulator(before);
        backend.AddColumnSums(bench.Source(dy), gradient.Tensor);
        Matrix magnitude = before.Abs().Plus(Reference.ColumnSums(dy.Abs()));
        Matrix expected = before.Plus(Reference.ColumnSums(dy));
        Expect.Close("column sums", gradient.Read(), expected, magnitude, Expect.Roundings(rows));
        bench.Verify();
    }

    public static void ScaleColumns(IComputeBackend backend, int rows, int columns, bool accumulate, bool inPlace)
    {
        using var bench = new Workbench(backend);
        (Matrix x, Matrix gain) = (bench.Random(rows, columns), Gain(bench, columns));
        Matrix before = inPlace ? x : bench.Random(rows, columns);
        Operand y = accumulate || inPlace ? bench.Target(before) : bench.Output(rows, columns);
        backend.ScaleColumns(inPlace ? y : bench.Source(x), bench.Constant(gain), y, accumulate);
        Close("scaled columns", y, Reference.ScaleColumns(x, gain), Magnitude(x, gain), accumulate ? before : null);
        bench.Verify();
    }

    /// <summary>dx is a fresh tensor, dy itself, or null.</summary>
    public static void ScaleColumnsBackward(
        IComputeBackend backend, int rows, int columns, bool accumulate, bool inPlace, bool withDx = true)
    {
        using var bench = new Workbench(backend);
        (Matrix x, Matrix dy, Matrix gain) = (bench.Random(rows, columns), bench.Random(rows, columns), Gain(bench, columns));
        (Matrix oldGradient, Matrix oldDx) = (bench.Random(1, columns), inPlace ? dy : bench.Random(rows, columns));
        Operand gradGain = bench.Accumulator(oldGradient);
        Operand dx = accumulate || inPlace || !withDx ? bench.Target(oldDx) : bench.Output(rows, columns);
        TensorSlice? dxSlice = withDx ? dx.All : null;
        backend.ScaleColumnsBackward(
            bench.Source(x), inPlace ? dx : bench.Source(dy), bench.Constant(gain), gradGain.Tensor, dxSlice, accumulate);

        (Matrix gradient, Matrix expected) = Reference.ScaleColumnsBackward(x, dy, gain);
        Matrix magnitude = Reference.ScaleColumnsBackward(x.Abs(), dy.Abs(), gain).GradGain;
        Expect.Close(
            "gain gradient", gradGain.Read(), oldGradient.Plus(gradient), oldGradient.Abs().Plus(magnitude),
            Expect.Roundings(rows));
        if (withDx)
        {
            Close("scaled columns dx", dx, expected, Magnitude(dy, gain), accumulate ? oldDx : null);
        }
        else
        {
            Expect.SameBits("scaled columns dx", dx.Read(), oldDx);
        }

        bench.Verify();
    }

    /// <summary>Columns [from, from + count) of one matrix become columns [to, to + count) of another; its others stay.</summary>
    public static void Copy(IComputeBackend backend, int rows, int from, int to, int count)
    {
        using var bench = new Workbench(backend);
        (Matrix source, Matrix before) = (bench.Random(rows, 41), bench.Random(rows, 29));
        Operand destination = bench.Target(before);
        backend.CopyColumns(bench.Source(source), from, destination, to, count);
        Expect.SameBits("copied columns", destination.Read(), Copied(source, from, before, to, count));
        bench.Verify();
    }

    /// <summary>Both ends in the same rows.</summary>
    public static void CopyInPlace(IComputeBackend backend, int rows)
    {
        using var bench = new Workbench(backend);
        Matrix before = bench.Random(rows, 37);
        Operand rowsOfBoth = bench.Target(before);
        backend.CopyColumns(rowsOfBoth, 20, rowsOfBoth, 3, 17);
        Expect.SameBits("copied columns", rowsOfBoth.Read(), Copied(before, 20, before, 3, 17));
        bench.Verify();
    }

    private static Matrix Copied(Matrix source, int from, Matrix before, int to, int count)
    {
        Matrix expected = before.Copy();
        for (int row = 0; row < source.Rows; row++)
        {
            for (int c = 0; c < count; c++)
            {
                expected[row, to + c] = source[row, from + c];
            }
        }

        return expected;
    }

    // Around 1, where trained gains are; one is exactly 1, and adds nothing.
    private static Matrix Gain(Workbench bench, int columns)
    {
        Matrix gain = bench.Random(1, columns, 1.5).Map(value => (float)(1 + value));
        gain[0, 0] = 1;
        return gain;
    }

    // gain - 1 rounds too.
    private static Matrix Magnitude(Matrix x, Matrix gain) =>
        Reference.ScaleColumns(x.Abs(), gain.Map(value => 2 + Math.Abs(value)));

    private static void Close(string what, Operand actual, Matrix expected, Matrix magnitude, Matrix? before) =>
        Expect.Close(
            what, actual.Read(), before is null ? expected : before.Plus(expected),
            before is null ? magnitude : before.Abs().Plus(magnitude), 3);
}
