using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>A row-major matrix in double: what <see cref="Reference"/> computes with, and what a download becomes.</summary>
internal sealed class Matrix(int rows, int columns)
{
    private readonly int _columns = columns;
    private readonly double[] _values = new double[rows * columns];

    public int Rows { get; } = rows;

    /// <summary>What each value was rounded to when the device wrote it; F32 where it came from elsewhere.</summary>
    public DType Type { get; set; }

    public int Columns => _columns;

    public double[] Values => _values;

    // On fields, because unoptimised builds pay a call for every property of every element.
    public ref double this[int row, int column] => ref _values[(row * _columns) + column];

    public static Matrix Filled(int rows, int columns, double value)
    {
        var result = new Matrix(rows, columns);
        Array.Fill(result.Values, value);
        return result;
    }

    public static Matrix FromFloats(int rows, int columns, ReadOnlySpan<float> values)
    {
        var result = new Matrix(rows, columns);
        for (int i = 0; i < values.Length; i++)
        {
            result.Values[i] = values[i];
        }

        return result;
    }

    public static Matrix Column(double[] values)
    {
        var result = new Matrix(values.Length, 1);
        values.CopyTo(result.Values, 0);
        return result;
    }

    /// <summary>Uniform in [-scale, scale), every value an F32.</summary>
    public static Matrix Random(ref SeededRandom random, int rows, int columns, double scale = 1)
    {
        var result = new Matrix(rows, columns);
        for (int i = 0; i < result.Values.Length; i++)
        {
            result.Values[i] = (float)(scale * ((2 * random.NextDouble()) - 1));
        }

        return result;
    }

    /// <summary>A copy of rows [start, start + count).</summary>
    public Matrix Slice(int start, int count)
    {
        var result = new Matrix(count, Columns) { Type = Type };
        Array.Copy(Values, start * Columns, result.Values, 0, count * Columns);
        return result;
    }

    /// <summary>Overwrites rows [start, start + source.Rows).</summary>
    public void SetRows(int start, Matrix source) => source.Values.CopyTo(Values, start * Columns);

    public Matrix Copy() => Slice(0, Rows);

    public Matrix Abs() => Map(Math.Abs);

    public Matrix Map(Func<double, double> f)
    {
        Matrix result = new(Rows, Columns);
        for (int i = 0; i < Values.Length; i++)
        {
            result.Values[i] = f(Values[i]);
        }

        return result;
    }

    public Matrix Plus(Matrix other)
    {
        Check.That(Rows == other.Rows && Columns == other.Columns);
        Matrix result = new(Rows, Columns);
        for (int i = 0; i < Values.Length; i++)
        {
            result.Values[i] = Values[i] + other.Values[i];
        }

        return result;
    }

    /// <summary>Sum of products of equal places: the scalar that finite differences differentiate.</summary>
    public double Dot(Matrix other) => Values.Zip(other.Values, (a, b) => a * b).Sum();

    public double Max() => Values.Length == 0 ? 0 : Values.Max();

    public float[] ToFloats() => Array.ConvertAll(Values, value => (float)value);

    /// <summary>Every value rounded to the nearest of <paramref name="type"/>, ties to even.</summary>
    public Matrix Rounded(DType type) => Map(value => type switch
    {
        DType.F32 => (float)value,
        DType.F16 => (double)(Half)value,
        _ => BFloat16((float)value),
    });

    private static double BFloat16(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        bits += 0x7FFF + ((bits >> 16) & 1);
        return BitConverter.UInt32BitsToSingle(bits & 0xFFFF0000);
    }
}
