namespace FlexLLM.Tests.Contracts;

/// <summary>The operations that a bypass is composed of.</summary>
internal static partial class Reference
{
    // scale * (x M^T).  x [rows, wide], m [inner, wide].
    public static Matrix Narrow(Matrix x, Matrix m, double scale) => Linear(x, m).Map(value => scale * value);

    // scale * (u M).  u [rows, inner].
    public static Matrix Widen(Matrix u, Matrix m, double scale) => LinearBackwardInput(u, m).Map(value => scale * value);

    // (scale * u)^T x.
    public static Matrix Outer(Matrix u, Matrix x, double scale) => TransposedProduct(u, x).Map(value => scale * value);

    // y + bias in every row.
    public static Matrix AddBias(Matrix y, Matrix bias) => ByColumn(y, bias, (value, b) => value + b);

    public static Matrix ColumnSums(Matrix dy) => TransposedProduct(Matrix.Filled(dy.Rows, 1, 1), dy);

    // x * (gain - 1): gain [1, n].
    public static Matrix ScaleColumns(Matrix x, Matrix gain) => ByColumn(x, gain, (value, g) => value * (g - 1));

    // gradGain = sum of x * dy, dx = dy * (gain - 1).
    public static (Matrix GradGain, Matrix Dx) ScaleColumnsBackward(Matrix x, Matrix dy, Matrix gain)
    {
        var products = new Matrix(x.Rows, x.Columns);
        for (int i = 0; i < products.Values.Length; i++)
        {
            products.Values[i] = x.Values[i] * dy.Values[i];
        }

        return (ColumnSums(products), ScaleColumns(dy, gain));
    }

    public static Matrix Relu(Matrix x) => x.Map(value => value <= 0 ? 0 : value);

    // dx = y > 0 ? dy : 0.
    public static Matrix ReluBackward(Matrix y, Matrix dy)
    {
        var dx = new Matrix(y.Rows, y.Columns);
        for (int i = 0; i < dx.Values.Length; i++)
        {
            dx.Values[i] = y.Values[i] > 0 ? dy.Values[i] : 0;
        }

        return dx;
    }

    public static Matrix Silu(Matrix x) => SiluGate(x, Matrix.Filled(x.Rows, x.Columns, 1));

    public static Matrix SiluBackward(Matrix x, Matrix dy) => SiluGateBackward(x, Matrix.Filled(x.Rows, x.Columns, 1), dy).DGate;

    private static Matrix ByColumn(Matrix x, Matrix row, Func<double, double, double> f)
    {
        var y = new Matrix(x.Rows, x.Columns);
        for (int i = 0; i < x.Rows; i++)
        {
            for (int c = 0; c < x.Columns; c++)
            {
                y[i, c] = f(x[i, c], row[0, c]);
            }
        }

        return y;
    }
}
