using FlexLLM.Backends;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>Logits of chosen rows, and the fused loss.</summary>
internal static class LossChecks
{
    /// <summary>Of 9 rows, so many, in random order with repeats; the rows that are not chosen are NaN.</summary>
    public static void Logits(IComputeBackend backend, int chosen, int hidden, int vocabulary, DType type)
    {
        using var bench = new Workbench(backend);
        Matrix x = bench.Random(9, hidden);
        int[] rows = [.. Enumerable.Range(0, chosen).Select(i => i == 0 ? 8 : bench.Chance.Next(9))];
        foreach (int row in Enumerable.Range(0, 9).Except(rows))
        {
            x.SetRows(row, Matrix.Filled(1, hidden, double.NaN));
        }

        (DeviceWeight weight, Matrix head) = bench.RandomWeight(vocabulary, hidden, type);
        Operand logits = bench.Output(chosen, vocabulary, TensorUse.Exact);
        backend.Logits(bench.Source(x), rows, weight, logits);
        Matrix magnitude = Reference.Logits(x.Abs(), rows, head.Abs());
        Expect.Close("logits", logits.Read(), Reference.Logits(x, rows, head), magnitude, Expect.Roundings(hidden));
        bench.Verify();
    }

    /// <summary>Every third row has its largest value at several places, the first column among them; some rows have none.</summary>
    public static void ArgMax(IComputeBackend backend, int rows, int columns)
    {
        using var bench = new Workbench(backend);
        Matrix x = WithOddRows(bench, rows, columns);
        int[] actual = [.. Enumerable.Repeat(-7, rows)];
        backend.ArgMax(bench.Source(x), actual);
        Assert.That(actual, Is.EqualTo(Reference.ArgMax(x)));
        bench.Verify();
    }

    /// <summary>Of the same rows: values as the reference sorts them, each at its column, none twice.</summary>
    public static void Largest(IComputeBackend backend, int rows, int columns, int count)
    {
        using var bench = new Workbench(backend);
        Matrix x = WithOddRows(bench, rows, columns);
        float[] values = new float[rows * count];
        int[] places = new int[rows * count];
        backend.Largest(bench.Source(x), count, values, places);
        for (int row = 0; row < rows; row++)
        {
            float[] own = values[(row * count)..((row + 1) * count)];
            int[] at = places[(row * count)..((row + 1) * count)];
            float[] sorted = [.. Reference.Order(x, row).Select(column => (float)x[row, column])];
            if (float.IsNaN(sorted[0]))
            {
                Assert.That(own[0], Is.NaN);
                continue;
            }

            Assert.That(own, Is.EqualTo(sorted[..count]));
            Assert.That(at, Is.Unique.And.All.InRange(0, columns - 1));
            Assert.That(at.Select(column => (float)x[row, column]), Is.EqualTo(own));
        }

        bench.Verify();
    }

    private static Matrix WithOddRows(Workbench bench, int rows, int columns)
    {
        Matrix x = bench.Random(rows, columns);
        double[] odd = [double.NaN, double.PositiveInfinity, double.NegativeInfinity];
        for (int row = 0; row < rows; row++)
        {
            if (row % 3 == 0)
            {
                x[row, 0] = x[row, columns / 2] = x[row, columns - 1] = 9;
            }

            if (row % 4 == 1)
            {
                x[row, bench.Chance.Next(columns)] = odd[row / 4 % 3];
            }
        }

        if (rows > 8)
        {
            x.SetRows(8, Matrix.Filled(1, columns, double.NegativeInfinity));
        }

        return x;
    }

    /// <summary>
    /// <paramref name="targetEvery"/>: each n-th row has a target, 0 means none has. Rows without a target are NaN in x.
    /// </summary>
    public static void CrossEntropy(
        IComputeBackend backend, int rows, int hidden, int vocabulary, int targetEvery, DType type = DType.F32,
        double scale = 1)
    {
        using var bench = new Workbench(backend);
        const float gradientScale = 0.125f / 3;
        Matrix x = bench.Random(rows, hidden, scale);
        int[] targets = new int[rows];
        for (int row = 0; row < rows; row++)
        {
            bool hasTarget = targetEvery > 0 && row % targetEvery == targetEvery - 1;
            targets[row] = !hasTarget ? -1 : row % 3 == 0 ? vocabulary - 1 : bench.Chance.Next(vocabulary);
            if (!hasTarget)
            {
                x.SetRows(row, Matrix.Filled(1, hidden, double.NaN));
            }
        }

        (DeviceWeight weight, Matrix head) = bench.RandomWeight(vocabulary, hidden, type);
        Operand dx = bench.Output(rows, hidden);
        Operand losses = bench.Output(rows, 1, TensorUse.Exact);
        backend.FusedLinearCrossEntropy(bench.Source(x), targets, weight, gradientScale, dx, losses);

        int[] live = [.. Enumerable.Range(0, rows).Where(row => targets[row] >= 0)];
        double largest = Reference.Logits(x.Abs(), live, head.Abs()).Max();
        double logitRoundings = 2 * Expect.Roundings(hidden) * largest;
        Matrix expected = Matrix.Column(Reference.CrossEntropy(x, targets, head));
        Matrix one = expected.Map(value => 1 + Math.Abs(value));
        Expect.Close("losses", losses.Read(), expected, one, logitRoundings + Expect.Roundings(vocabulary));
        Matrix magnitude = Reference.CrossEntropyBackwardMagnitude(x, targets, head, gradientScale);
        Matrix gradient = Reference.CrossEntropyBackward(x, targets, head, gradientScale);
        Expect.Close("loss dx", dx.Read(), gradient, magnitude, logitRoundings + Expect.Roundings(vocabulary, vocabulary));
        foreach (int row in Enumerable.Range(0, rows).Except(live))
        {
            Expect.SameBits("loss without a target", losses.Read().Slice(row, 1), new Matrix(1, 1));
            Expect.SameBits("dx without a target", dx.Read().Slice(row, 1), new Matrix(1, hidden));
        }

        bench.Verify();
    }
}
