namespace FlexLLM.Tests.Contracts;

/// <summary>
/// The living definition of every operation of IComputeBackend: plain loops in double, forward beside backward, nothing
/// clever. Gradients are proven by finite differences. A "magnitude" is the same sum with every term made positive: the
/// yardstick of a rounding error.
/// </summary>
internal static partial class Reference
{
    public static Matrix Gather(Matrix table, int[] ids)
    {
        var y = new Matrix(ids.Length, table.Columns);
        for (int i = 0; i < ids.Length; i++)
        {
            for (int c = 0; c < table.Columns; c++)
            {
                y[i, c] = table[ids[i], c];
            }
        }

        return y;
    }

    // y = x / rms * gain, per group of gain.Columns columns.
    public static Matrix RmsNorm(Matrix x, Matrix gain, double epsilon)
    {
        int n = gain.Columns;
        var y = new Matrix(x.Rows, x.Columns);
        for (int row = 0; row < x.Rows; row++)
        {
            for (int group = 0; group < x.Columns; group += n)
            {
                double r = InverseRms(x, row, group, n, epsilon);
                for (int c = 0; c < n; c++)
                {
                    y[row, group + c] = x[row, group + c] * r * gain[0, c];
                }
            }
        }

        return y;
    }

    public static Matrix RmsNormBackward(Matrix x, Matrix gain, double epsilon, Matrix dy) =>
        RmsNormBackward(x, gain, epsilon, dy, -1);

    public static Matrix RmsNormBackwardMagnitude(Matrix x, Matrix gain, double epsilon, Matrix dy) =>
        RmsNormBackward(x.Abs(), gain.Abs(), epsilon, dy.Abs(), +1);

    // y = x W^T + bias.  x [rows, in], w [out, in], bias [1, out].
    public static Matrix Linear(Matrix x, Matrix w, Matrix? bias = null)
    {
        var y = new Matrix(x.Rows, w.Rows);
        for (int row = 0; row < x.Rows; row++)
        {
            for (int o = 0; o < w.Rows; o++)
            {
                double sum = bias is null ? 0 : bias[0, o];
                for (int i = 0; i < w.Columns; i++)
                {
                    sum += x[row, i] * w[o, i];
                }

                y[row, o] = sum;
            }
        }

        return y;
    }

    // dx = dy W.
    public static Matrix LinearBackwardInput(Matrix dy, Matrix w)
    {
        var dx = new Matrix(dy.Rows, w.Columns);
        for (int row = 0; row < dy.Rows; row++)
        {
            for (int o = 0; o < w.Rows; o++)
            {
                for (int i = 0; i < w.Columns; i++)
                {
                    dx[row, i] += dy[row, o] * w[o, i];
                }
            }
        }

        return dx;
    }

    // scale * (x A^T) B^T.  a [rank, in], bTransposed [rank, out].
    public static Matrix LoraBypass(Matrix x, Matrix a, Matrix bTransposed, double scale) =>
        LinearBackwardInput(Linear(x, a), bTransposed).Map(value => scale * value);

    // u = x A^T, du = scale * dy B;  gradA = du^T x, gradBTransposed = (scale * u)^T dy, dx = du A.
    public static (Matrix GradA, Matrix GradBTransposed, Matrix Dx) LoraBypassBackward(
        Matrix x, Matrix dy, Matrix a, Matrix bTransposed, double scale)
    {
        Matrix u = Linear(x, a).Map(value => scale * value);
        Matrix du = Linear(dy, bTransposed).Map(value => scale * value);
        return (TransposedProduct(du, x), TransposedProduct(u, dy), LinearBackwardInput(du, a));
    }

    // (x[i], x[i+h]) -> (x[i] cos - x[i+h] sin, x[i+h] cos + x[i] sin), h = headDim / 2.
    public static Matrix Rope(Matrix x, int[] positions, Matrix table, bool inverse)
    {
        int h = table.Columns / 2;
        var y = new Matrix(x.Rows, x.Columns);
        for (int row = 0; row < x.Rows; row++)
        {
            for (int head = 0; head < x.Columns; head += 2 * h)
            {
                for (int i = 0; i < h; i++)
                {
                    double cos = table[positions[row], i];
                    double sin = inverse ? -table[positions[row], h + i] : table[positions[row], h + i];
                    y[row, head + i] = (x[row, head + i] * cos) - (x[row, head + h + i] * sin);
                    y[row, head + h + i] = (x[row, head + h + i] * cos) + (x[row, head + i] * sin);
                }
            }
        }

        return y;
    }

    public static Matrix SiluGate(Matrix gate, Matrix up)
    {
        var y = new Matrix(gate.Rows, gate.Columns);
        for (int i = 0; i < y.Values.Length; i++)
        {
            y.Values[i] = gate.Values[i] * Sigmoid(gate.Values[i]) * up.Values[i];
        }

        return y;
    }

    // dGate = dy * up * s * (1 + gate * (1 - s)), dUp = dy * gate * s, s = sigmoid(gate).
    public static (Matrix DGate, Matrix DUp) SiluGateBackward(Matrix gate, Matrix up, Matrix dy)
    {
        var dGate = new Matrix(gate.Rows, gate.Columns);
        var dUp = new Matrix(gate.Rows, gate.Columns);
        for (int i = 0; i < dy.Values.Length; i++)
        {
            double g = gate.Values[i];
            double s = Sigmoid(g);
            dGate.Values[i] = dy.Values[i] * up.Values[i] * s * (1 + (g * (1 - s)));
            dUp.Values[i] = dy.Values[i] * g * s;
        }

        return (dGate, dUp);
    }

    /// <summary>First column of each row's largest value; -1 where one is NaN or the largest is infinite.</summary>
    public static int[] ArgMax(Matrix x)
    {
        int[] columns = new int[x.Rows];
        for (int row = 0; row < x.Rows; row++)
        {
            double[] values = [.. Enumerable.Range(0, x.Columns).Select(column => x[row, column])];
            bool hasNone = values.Any(double.IsNaN) || !double.IsFinite(values.Max());
            columns[row] = hasNone ? -1 : Array.IndexOf(values, values.Max());
        }

        return columns;
    }

    /// <summary>Columns of a row by their values, NaN first, then the largest; the lowest of equals first.</summary>
    public static int[] Order(Matrix x, int row) =>
    [
        .. Enumerable.Range(0, x.Columns)
            .OrderByDescending(column => double.IsNaN(x[row, column])).ThenByDescending(column => x[row, column]),
    ];

    public static Matrix Logits(Matrix x, int[] rows, Matrix head) => Linear(Gather(x, rows), head);

    // losses[i] = -log softmax(x_i head^T)[targets[i]]; rows without a target lose nothing.
    public static double[] CrossEntropy(Matrix x, int[] targets, Matrix head)
    {
        double[] losses = new double[x.Rows];
        for (int row = 0; row < x.Rows; row++)
        {
            if (targets[row] >= 0)
            {
                losses[row] = -Math.Log(Softmax(Linear(x.Slice(row, 1), head))[0, targets[row]]);
            }
        }

        return losses;
    }

    // dx_i = gradientScale * (softmax(logits_i) - onehot) head.
    public static Matrix CrossEntropyBackward(Matrix x, int[] targets, Matrix head, double gradientScale) =>
        CrossEntropyBackward(x, targets, head, head, gradientScale, -1);

    public static Matrix CrossEntropyBackwardMagnitude(Matrix x, int[] targets, Matrix head, double gradientScale) =>
        CrossEntropyBackward(x, targets, head, head.Abs(), Math.Abs(gradientScale), +1);

    private static Matrix RmsNormBackward(Matrix x, Matrix gain, double epsilon, Matrix dy, int minus)
    {
        int n = gain.Columns;
        var dx = new Matrix(x.Rows, x.Columns);
        for (int row = 0; row < x.Rows; row++)
        {
            for (int group = 0; group < x.Columns; group += n)
            {
                double r = InverseRms(x, row, group, n, epsilon);
                double sum = 0;
                for (int c = 0; c < n; c++)
                {
                    sum += dy[row, group + c] * gain[0, c] * x[row, group + c];
                }

                for (int c = 0; c < n; c++)
                {
                    dx[row, group + c] = (r * dy[row, group + c] * gain[0, c])
                        + (minus * x[row, group + c] * r * r * r / n * sum);
                }
            }
        }

        return dx;
    }

    private static Matrix CrossEntropyBackward(
        Matrix x, int[] targets, Matrix head, Matrix factor, double gradientScale, int minus)
    {
        var dx = new Matrix(x.Rows, x.Columns);
        for (int row = 0; row < x.Rows; row++)
        {
            if (targets[row] >= 0)
            {
                Matrix dLogits = Softmax(Linear(x.Slice(row, 1), head));
                dLogits[0, targets[row]] += minus;
                dx.SetRows(row, LinearBackwardInput(dLogits, factor).Map(value => gradientScale * value));
            }
        }

        return dx;
    }

    private static Matrix Softmax(Matrix logits)
    {
        double max = logits.Max();
        Matrix exponentials = logits.Map(value => Math.Exp(value - max));
        double sum = exponentials.Values.Sum();
        return exponentials.Map(value => value / sum);
    }

    private static double InverseRms(Matrix x, int row, int group, int n, double epsilon)
    {
        double sum = 0;
        for (int c = 0; c < n; c++)
        {
            sum += x[row, group + c] * x[row, group + c];
        }

        return 1 / Math.Sqrt((sum / n) + epsilon);
    }

    // left^T right, summed over rows.
    private static Matrix TransposedProduct(Matrix left, Matrix right)
    {
        var product = new Matrix(left.Columns, right.Columns);
        for (int row = 0; row < left.Rows; row++)
        {
            for (int i = 0; i < left.Columns; i++)
            {
                for (int j = 0; j < right.Columns; j++)
                {
                    product[i, j] += left[row, i] * right[row, j];
                }
            }
        }

        return product;
    }

    private static double Sigmoid(double x) => 1 / (1 + Math.Exp(-x));
}
