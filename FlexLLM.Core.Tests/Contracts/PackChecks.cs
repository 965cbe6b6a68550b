using FlexLLM.Backends;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>Rows made small and large again. Packed rows are compared as bits: as numbers some of them are NaN.</summary>
internal static class PackChecks
{
    /// <summary>What comes back is what the format keeps, also by way of a copy; and a row packs alone as in company.</summary>
    public static void RoundTrip(IComputeBackend backend, int rows, int columns, PackedFormat format)
    {
        using var bench = new Workbench(backend);
        Matrix source = bench.Held(Special(bench.Random(rows, columns)));
        int packedColumns = PackedFormats.PackedColumns(columns, format);
        Operand x = bench.Source(source);
        (Operand packed, Operand again, Operand copy) =
            (Packed(), Packed(), Packed());
        backend.Pack(x, format, packed);
        for (int row = 0; row < rows; row++)
        {
            backend.Pack(x.Slice(row, 1), format, again.Slice(row, 1));
        }

        int[] bits = Bits(backend, packed);
        Assert.That(Bits(backend, again), Is.EqualTo(bits), "packed row by row");
        backend.Copy(packed, copy);
        Assert.That(Bits(backend, copy), Is.EqualTo(bits), "copied");

        Operand y = bench.Output(rows, columns);
        backend.Unpack(copy, format, y);
        Assert.That(Bits(backend, copy), Is.EqualTo(bits), "a source");
        Compare(y.Read(), Kept(source, format));
        bench.Verify();

        Operand Packed() => bench.Output(rows, packedColumns, TensorUse.Exact);
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
    private static void Compare(Matrix actual, Matrix expected)
    {
        Matrix canonical = actual.Map(value => double.IsNaN(value) ? double.NaN : value);
        Expect.SameBits("unpacked", canonical, expected.Map(value => double.IsNaN(value) ? double.NaN : value));
    }

    private static int[] Bits(IComputeBackend backend, TensorSlice slice)
    {
        float[] values = new float[slice.Rows * slice.Columns];
        backend.Download(slice, values);
        return Array.ConvertAll(values, BitConverter.SingleToInt32Bits);
    }
}
