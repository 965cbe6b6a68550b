using FlexLLM.Backends;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>The bypass over segments of rows, and its gradients.</summary>
internal static class LoraChecks
{
    /// <summary>One adapter of each rank; segments of the given row counts (0 is legal), a row outside around each.</summary>
    public static void Forward(IComputeBackend backend, int inFeatures, int outFeatures, int[] ranks, params int[] counts)
    {
        using var bench = new Workbench(backend);
        int rows = counts.Sum() + counts.Length + 1;
        (Matrix x, Matrix before) = (bench.Random(rows, inFeatures), bench.Random(rows, outFeatures));
        (Matrix A, Matrix B)[] pairs =
            [.. ranks.Select(rank => (bench.Random(rank, inFeatures), bench.Random(rank, outFeatures)))];
        (DeviceFactor A, DeviceFactor B)[] loras = [.. pairs.Select(pair => (bench.Factor(pair.A), bench.Factor(pair.B)))];
        var segments = new LoraSegment[counts.Length];
        (Matrix expected, Matrix magnitude) = (before.Copy(), before.Abs());
        int row = 0;
        for (int i = 0; i < counts.Length; i++)
        {
            // NaN in the rows outside: they must not be read into their neighbours either.
            x.SetRows(row++, Matrix.Filled(1, inFeatures, double.NaN));
            (Matrix a, Matrix b) = pairs[i % pairs.Length];
            float scale = 0.5f + i;
            segments[i] = new LoraSegment(row, counts[i], loras[i % loras.Length].A, loras[i % loras.Length].B, scale);
            (Matrix xs, Matrix ys) = (x.Slice(row, counts[i]), before.Slice(row, counts[i]));
            expected.SetRows(row, ys.Plus(Reference.LoraBypass(xs, a, b, scale)));
            magnitude.SetRows(row, ys.Abs().Plus(Reference.LoraBypass(xs.Abs(), a.Abs(), b.Abs(), scale)));
            row += counts[i];
        }

        Operand y = bench.Target(before);
        backend.LoraBypass(bench.Source(x), segments, y);
        Matrix actual = y.Read();
        Expect.Close("lora", actual, expected, magnitude, Expect.Roundings(inFeatures, ranks.Max()));
        for (int i = 0, outside = 0; i <= counts.Length; outside += (i < counts.Length ? counts[i] : 0) + 1, i++)
        {
            Expect.SameBits("row outside segments", actual.Slice(outside, 1), before.Slice(outside, 1));
        }

        bench.Verify();
    }

    /// <summary>
    /// Decode rows below each other, each with an adapter of its own, of some rank and scale. One of them is made of NaN, and so is its row
    /// alone.
    /// </summary>
    public static void DecodeRows(IComputeBackend backend, int inFeatures, int outFeatures, params (int Rank, float Scale)[] adapters)
    {
        using var bench = new Workbench(backend);
        int rows = adapters.Length;
        int broken = rows / 2;
        (Matrix x, Matrix before) = (bench.Random(rows, inFeatures), bench.Random(rows, outFeatures));
        (Matrix expected, Matrix magnitude) = (before.Copy(), before.Abs());
        var segments = new LoraSegment[rows];
        for (int i = 0; i < rows; i++)
        {
            (int rank, float scale) = adapters[i];
            Matrix a = i == broken ? Matrix.Filled(rank, inFeatures, double.NaN) : bench.Random(rank, inFeatures);
            Matrix b = i == broken ? Matrix.Filled(rank, outFeatures, double.NaN) : bench.Random(rank, outFeatures);
            segments[i] = new LoraSegment(i, 1, bench.Factor(a), bench.Factor(b), scale);
            Matrix xs = x.Slice(i, 1);
            expected.SetRows(i, before.Slice(i, 1).Plus(Reference.LoraBypass(xs, a, b, scale)));
            magnitude.SetRows(i, before.Slice(i, 1).Abs().Plus(Reference.LoraBypass(xs.Abs(), a.Abs(), b.Abs(), scale)));
        }

        Operand y = bench.Target(before);
        backend.LoraBypass(bench.Source(x), segments, y);
        Matrix actual = y.Read();
        Assert.That(actual.Slice(broken, 1).Values, Is.All.NaN);
        foreach ((int first, int count) in new[] { (0, broken), (broken + 1, rows - broken - 1) })
        {
            Expect.Close(
                "lora", actual.Slice(first, count), expected.Slice(first, count), magnitude.Slice(first, count),
                Expect.Roundings(inFeatures, adapters.Max(a => a.Rank)));
        }

        bench.Verify();
    }

    /// <summary>After RefreshFactor, new values count.</summary>
    public static void Refresh(IComputeBackend backend)
    {
        using var bench = new Workbench(backend);
        (DeviceFactor deviceA, DeviceFactor deviceB) = (bench.Factor(bench.Random(3, 11)), bench.Factor(bench.Random(3, 9)));
        (Matrix x, Matrix a, Matrix b) = (bench.Random(5, 11), bench.Random(3, 11), bench.Random(3, 9));
        backend.Upload(a.ToFloats(), deviceA.Values);
        backend.Upload(b.ToFloats(), deviceB.Values);
        backend.RefreshFactor(deviceA);
        backend.RefreshFactor(deviceB);
        Operand y = bench.Target(new Matrix(5, 9));
        backend.LoraBypass(bench.Source(x), [new LoraSegment(0, 5, deviceA, deviceB, 1)], y);
        Matrix magnitude = Reference.LoraBypass(x.Abs(), a.Abs(), b.Abs(), 1);
        Expect.Close("refreshed", y.Read(), Reference.LoraBypass(x, a, b, 1), magnitude, Expect.Roundings(11, 3));
        bench.Verify();
    }

    public static void Backward(
        IComputeBackend backend, int rows, int inFeatures, int outFeatures, int rank, bool withDx, float scale = 1.5f)
    {
        using var bench = new Workbench(backend);
        (Matrix x, Matrix dy) = (bench.Random(rows, inFeatures), bench.Random(rows, outFeatures));
        (Matrix a, Matrix b) = (bench.Random(rank, inFeatures), bench.Random(rank, outFeatures));
        (Matrix oldA, Matrix oldB, Matrix oldDx) =
            (bench.Random(rank, inFeatures), bench.Random(rank, outFeatures), bench.Random(rows, inFeatures));
        (Operand gradA, Operand gradB, Operand dx) =
            (bench.Accumulator(oldA), bench.Accumulator(oldB), bench.Target(oldDx));
        TensorSlice? dxSlice = withDx ? dx.All : null;
        backend.LoraBypassBackward(
            bench.Source(x), bench.Source(dy), bench.Factor(a), bench.Factor(b), scale, gradA.Tensor, gradB.Tensor, dxSlice);

        (Matrix newA, Matrix newB, Matrix newDx) = Reference.LoraBypassBackward(x, dy, a, b, scale);
        (Matrix absA, Matrix absB, Matrix absDx) =
            Reference.LoraBypassBackward(x.Abs(), dy.Abs(), a.Abs(), b.Abs(), scale);
        Close("gradA", gradA, oldA, newA, absA, Expect.Roundings(outFeatures, rows));
        Close("gradB", gradB, oldB, newB, absB, Expect.Roundings(inFeatures, rows));
        if (withDx)
        {
            Close("lora dx", dx, oldDx, newDx, absDx, Expect.Roundings(outFeatures, rank));
        }
        else
        {
            Expect.SameBits("lora dx", dx.Read(), oldDx);
        }

        bench.Verify();
    }

    private static void Close(
        string what, Operand actual, Matrix before, Matrix added, Matrix magnitude, double roundings) =>
        Expect.Close(what, actual.Read(), before.Plus(added), before.Abs().Plus(magnitude), roundings);
}
