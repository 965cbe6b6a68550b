using FlexLLM.Backends;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>Rows made small and large again, and copies of bits.</summary>
internal static class PackChecks
{
    /// <summary>
    /// What comes back is what the format keeps, once and again, also by way of a copy, and of rows that were packed one by one; the rows
    /// before and after stay as they are.
    /// </summary>
    public static void RoundTrip(IComputeBackend backend, int rows, int columns, PackedFormat format)
    {
        using var bench = new Workbench(backend);
        Matrix source = bench.Held(Special(bench.Random(rows + 2, columns)));
        Operand x = bench.Source(source);
        DeviceTensor[] packed = [.. Enumerable.Range(0, 3).Select(_ => bench.Packed(rows + 2, columns, format))];
        foreach (DeviceTensor tensor in packed)
        {
            backend.Pack(x.Slice(0, 1), format, tensor.Slice(rows + 1, 1));
            backend.Pack(x.Slice(rows + 1, 1), format, tensor.Slice(0, 1));
        }

        TensorSlice[] inside = Array.ConvertAll(packed, tensor => tensor.Slice(1, rows));
        backend.Pack(x.Slice(1, rows), format, inside[0]);
        for (int row = 0; row < rows; row++)
        {
            backend.Pack(x.Slice(1 + row, 1), format, inside[1].Slice(row, 1));
        }

        backend.Copy(inside[0], inside[2]);
        Matrix kept = Kept(source, format);
        string[] ways = ["packed", "packed row by row", "copied", "a source"];
        foreach ((string how, DeviceTensor tensor) in ways.Zip([.. packed, packed[0]]))
        {
            (Operand first, Operand y, Operand last) = (bench.Output(1, columns), bench.Output(rows, columns), bench.Output(1, columns));
            backend.Unpack(tensor.Slice(0, 1), format, first);
            backend.Unpack(tensor.Slice(1, rows), format, y);
            backend.Unpack(tensor.Slice(rows + 1, 1), format, last);
            Compare($"row before: {how}", first.Read(), kept.Slice(rows + 1, 1));
            Compare(how, y.Read(), kept.Slice(1, rows));
            Compare($"row after: {how}", last.Read(), kept.Slice(0, 1));
        }

        bench.Verify();
    }

    /// <summary>Copies move bits, among them those of a NaN that arithmetic would change.</summary>
    public static void CopiesAreBitwise(IComputeBackend backend)
    {
        using var bench = new Workbench(backend);
        int[] bits = [.. Enumerable.Range(0, 3 * 5).Select(i => unchecked((int)0xFF800001) + (i * 0x00011111))];
        (DeviceTensor source, DeviceTensor copy, DeviceTensor columns) =
            (bench.Own(backend.Allocate(3, 5)), bench.Own(backend.Allocate(3, 5)), bench.Own(backend.Allocate(3, 5)));
        backend.Upload(Array.ConvertAll(bits, BitConverter.Int32BitsToSingle), source);
        backend.Copy(source, copy);
        backend.CopyColumns(source, 0, columns, 0, 2);
        backend.CopyColumns(source, 2, columns, 2, 3);
        Assert.That(Bits(backend, source), Is.EqualTo(bits), "uploaded and downloaded");
        Assert.That(Bits(backend, copy), Is.EqualTo(bits), "copied");
        Assert.That(Bits(backend, columns), Is.EqualTo(bits), "copied by columns");
    }

    // Ties, both zeros, numbers on both sides of both ends of the exponent, and what is no number, spread over rows and columns.
    private static Matrix Special(Matrix values)
    {
        double[] special =
        [
            1 + (1.0 / 256), 1 + (3.0 / 256), -1 - (1.0 / 256), 0, -0.0, 1e-40, -1e-40, float.MaxValue, -float.MaxValue,
            float.Epsilon, double.NaN, double.PositiveInfinity, double.NegativeInfinity, 3.3895e38, 65535, -1e-3,
        ];
        for (int i = 0; i < values.Values.Length; i += 3)
        {
            values.Values[i] = (float)special[i / 3 % special.Length];
        }

        return values;
    }

    private static Matrix Kept(Matrix source, PackedFormat format) => format == PackedFormat.BF16
        ? source.Map(value => double.IsNaN(value) ? value : Matrix.Filled(1, 1, value).Rounded(DType.BF16)[0, 0])
        : source.Map(value => value > 0 ? 1 : 0);

    // NaN is NaN, whatever its bits.
    private static void Compare(string what, Matrix actual, Matrix expected)
    {
        Matrix canonical = actual.Map(value => double.IsNaN(value) ? double.NaN : value);
        Expect.SameBits(what, canonical, expected.Map(value => double.IsNaN(value) ? double.NaN : value));
    }

    private static int[] Bits(IComputeBackend backend, TensorSlice slice)
    {
        float[] values = new float[slice.Rows * slice.Columns];
        backend.Download(slice, values);
        return Array.ConvertAll(values, BitConverter.SingleToInt32Bits);
    }
}
