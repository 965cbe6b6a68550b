using FlexLLM.Backends;

namespace FlexLLM.Tests.Contracts;

/// <summary>Operations whose rows know nothing of each other: norms, linear layers, rotation, gates, sums.</summary>
internal static class DenseChecks
{
    public static void RmsNorm(
        IComputeBackend backend, int rows, int n, int groups, float epsilon = 1e-5f, bool inPlace = false, double scale = 1)
    {
        using var bench = new Workbench(backend);
        (Matrix x, Matrix gain) = (bench.Random(rows, groups * n, scale), bench.Random(1, n));
        Operand y = inPlace ? bench.Target(x) : bench.Output(rows, groups * n);
        backend.RmsNorm(inPlace ? y : bench.Source(x), bench.Constant(gain), epsilon, y);
        Matrix expected = Reference.RmsNorm(x, gain, epsilon);
        Expect.Close("rms norm", y.Read(), expected, expected.Abs(), Expect.Roundings(n));
        bench.Verify();
    }

    public static void RmsNormBackward(
        IComputeBackend backend, int rows, int n, int groups, bool accumulate, float epsilon = 1e-5f, bool inPlace = false)
    {
        using var bench = new Workbench(backend);
        (Matrix x, Matrix gain, Matrix dy) =
            (bench.Random(rows, groups * n), bench.Random(1, n), bench.Random(rows, groups * n));
        Matrix before = bench.Random(rows, groups * n);
        Operand dx = inPlace ? bench.Target(dy) : accumulate ? bench.Target(before) : bench.Output(rows, groups * n);
        backend.RmsNormBackward(
            bench.Source(x), bench.Constant(gain), epsilon, inPlace ? dx : bench.Source(dy), dx, accumulate);
        Matrix expected = Reference.RmsNormBackward(x, gain, epsilon, dy);
        Matrix magnitude = Reference.RmsNormBackwardMagnitude(x, gain, epsilon, dy);
        Close("rms norm dx", dx, expected, magnitude, accumulate ? before : null, Expect.Roundings(n, n));
        bench.Verify();
    }

    public static void Linear(
        IComputeBackend backend, int rows, int inFeatures, int outFeatures, DType type, bool bias, bool accumulate)
    {
        using var bench = new Workbench(backend);
        (Matrix x, Matrix b, Matrix before) =
            (bench.Random(rows, inFeatures), bench.Random(1, outFeatures), bench.Random(rows, outFeatures));
        (DeviceWeight weight, Matrix w) = bench.RandomWeight(outFeatures, inFeatures, type);
        Operand y = accumulate ? bench.Target(before) : bench.Output(rows, outFeatures);
        backend.Linear(bench.Source(x), weight, bias ? bench.Constant(b) : null, y, accumulate);
        Matrix expected = Reference.Linear(x, w, bias ? b : null);
        Matrix magnitude = Reference.Linear(x.Abs(), w.Abs(), bias ? b.Abs() : null);
        Close("linear", y, expected, magnitude, accumulate ? before : null, Expect.Roundings(inFeatures), bias ? 2 : 1);
        bench.Verify();
    }

    public static void LinearBackwardInput(
        IComputeBackend backend, int rows, int inFeatures, int outFeatures, DType type, bool accumulate)
    {
        using var bench = new Workbench(backend);
        (Matrix dy, Matrix before) = (bench.Random(rows, outFeatures), bench.Random(rows, inFeatures));
        (DeviceWeight weight, Matrix w) = bench.RandomWeight(outFeatures, inFeatures, type);
        Operand dx = accumulate ? bench.Target(before) : bench.Output(rows, inFeatures);
        backend.LinearBackwardInput(bench.Source(dy), weight, dx, accumulate);
        Matrix magnitude = Reference.LinearBackwardInput(dy.Abs(), w.Abs());
        Close(
            "linear dx", dx, Reference.LinearBackwardInput(dy, w), magnitude, accumulate ? before : null,
            Expect.Roundings(outFeatures));
        bench.Verify();
    }

    public static void Rope(IComputeBackend backend, int rows, int heads, int headDim, bool inverse)
    {
        using var bench = new Workbench(backend);
        Matrix x = bench.Random(rows, heads * headDim);
        Matrix table = ReferenceTests.RotationTable(40, headDim);
        int[] positions = [.. Enumerable.Range(0, rows).Select(row => row == 0 ? 39 : bench.Chance.Next(40))];
        Operand y = bench.Target(x);
        backend.Rope(y, positions, bench.Constant(table), inverse);
        Matrix expected = Reference.Rope(x, positions, table, inverse);

        Matrix magnitude = x.Abs();
        for (int i = 0; i < magnitude.Values.Length; i++)
        {
            int partner = i % headDim < headDim / 2 ? i + (headDim / 2) : i - (headDim / 2);
            magnitude.Values[i] += Math.Abs(x.Values[partner]);
        }

        Expect.Close("rope", y.Read(), expected, magnitude, 4, bf16Roundings: 2);
        bench.Verify();
    }

    /// <summary>y is a fresh tensor (0), gate (1) or up (2).</summary>
    public static void SiluGate(IComputeBackend backend, int rows, int columns, int destination = 0, double scale = 3)
    {
        using var bench = new Workbench(backend);
        (Matrix gate, Matrix up) = (bench.Random(rows, columns, scale), bench.Random(rows, columns));
        Operand y = bench.Target(destination == 0 ? Nan(rows, columns) : destination == 1 ? gate : up);
        backend.SiluGate(destination == 1 ? y : bench.Source(gate), destination == 2 ? y : bench.Source(up), y);

        // Two by itself; libtorch's BF16 silu on the CPU rounds on the way too, and was off by 2.4 with the product.
        Expect.Close(
            "silu gate", y.Read(), Reference.SiluGate(gate, up), SiluMagnitude(gate, up), Expect.Roundings(), bf16Roundings: 3);
        bench.Verify();
    }

    /// <summary>Each destination is a fresh tensor (0), gate (1), up (2) or dy (3).</summary>
    public static void SiluGateBackward(
        IComputeBackend backend, int rows, int columns, int dGateIs = 0, int dUpIs = 0, double scale = 3)
    {
        using var bench = new Workbench(backend);
        (Matrix gate, Matrix up, Matrix dy) =
            (bench.Random(rows, columns, scale), bench.Random(rows, columns), bench.Random(rows, columns));
        Operand[] sources =
        [
            bench.Output(rows, columns), Place(gate, 1), Place(up, 2), Place(dy, 3), bench.Output(rows, columns),
        ];
        (Operand dGate, Operand dUp) = (sources[dGateIs], sources[dUpIs == 0 ? 4 : dUpIs]);
        backend.SiluGateBackward(sources[1], sources[2], sources[3], dGate, dUp);
        (Matrix expectedDGate, Matrix expectedDUp) = Reference.SiluGateBackward(gate, up, dy);
        Matrix dGateMagnitude = Combine(dy, up, gate, (d, u, g) => Math.Abs(d * u) * (1 + Math.Abs(g)) / (1 + Math.Exp(-g)));
        Expect.Close("dGate", dGate.Read(), expectedDGate, dGateMagnitude, Expect.Roundings());
        Expect.Close("dUp", dUp.Read(), expectedDUp, SiluMagnitude(gate, dy), Expect.Roundings());
        bench.Verify();

        Operand Place(Matrix values, int index) =>
            index == dGateIs || index == dUpIs ? bench.Target(values) : bench.Source(values);
    }

    /// <summary>y is a fresh tensor (0), a (1) or b (2).</summary>
    public static void Add(IComputeBackend backend, int rows, int columns, int destination = 0)
    {
        using var bench = new Workbench(backend);
        (Matrix a, Matrix b) = (bench.Random(rows, columns), bench.Random(rows, columns));
        Operand y = bench.Target(destination == 0 ? Nan(rows, columns) : destination == 1 ? a : b);
        backend.Add(destination == 1 ? y : bench.Source(a), destination == 2 ? y : bench.Source(b), y);
        Expect.SameBits("add", y.Read(), a.Plus(b).Rounded(DType.F32));
        bench.Verify();
    }

    public static void Relu(IComputeBackend backend, int rows, int columns, bool inPlace = false)
    {
        using var bench = new Workbench(backend);
        Matrix x = WithZeros(bench.Random(rows, columns));
        Operand y = inPlace ? bench.Target(x) : bench.Output(rows, columns);
        backend.Relu(inPlace ? y : bench.Source(x), y);
        Expect.SameBits("relu", y.Read(), Reference.Relu(x));
        bench.Verify();
    }

    /// <summary>dx is a fresh tensor (0), y (1) or dy (2).</summary>
    public static void ReluBackward(IComputeBackend backend, int rows, int columns, int destination = 0)
    {
        using var bench = new Workbench(backend);
        (Matrix y, Matrix dy) = (WithZeros(bench.Random(rows, columns)), bench.Random(rows, columns));
        Operand dx = bench.Target(destination == 0 ? Nan(rows, columns) : destination == 1 ? y : dy);
        backend.ReluBackward(destination == 1 ? dx : bench.Source(y), destination == 2 ? dx : bench.Source(dy), dx);
        Expect.SameBits("relu dx", dx.Read(), Reference.ReluBackward(y, dy));
        bench.Verify();
    }

    public static void Silu(IComputeBackend backend, int rows, int columns, bool inPlace = false, double scale = 3)
    {
        using var bench = new Workbench(backend);
        Matrix x = bench.Random(rows, columns, scale);
        Operand y = inPlace ? bench.Target(x) : bench.Output(rows, columns);
        backend.Silu(inPlace ? y : bench.Source(x), y);
        Matrix magnitude = SiluMagnitude(x, Matrix.Filled(rows, columns, 1)).Plus(x.Map(Vanished));
        Expect.Close("silu", y.Read(), Reference.Silu(x), magnitude, Expect.Roundings());
        bench.Verify();
    }

    /// <summary>dx is a fresh tensor (0), x (1) or dy (2).</summary>
    public static void SiluBackward(IComputeBackend backend, int rows, int columns, int destination = 0, double scale = 3)
    {
        using var bench = new Workbench(backend);
        (Matrix x, Matrix dy) = (bench.Random(rows, columns, scale), bench.Random(rows, columns));
        Operand dx = bench.Target(destination == 0 ? Nan(rows, columns) : destination == 1 ? x : dy);
        backend.SiluBackward(destination == 1 ? dx : bench.Source(x), destination == 2 ? dx : bench.Source(dy), dx);
        Matrix magnitude = Combine(dy, x, x, (d, v, _) => Math.Abs(d) * (1 + Math.Abs(v)) / (1 + Math.Exp(-v)));
        Expect.Close(
            "silu dx", dx.Read(), Reference.SiluBackward(x, dy), magnitude.Plus(x.Map(Vanished)), Expect.Roundings());
        bench.Verify();
    }

    private static void Close(
        string what, Operand actual, Matrix expected, Matrix magnitude, Matrix? before, double roundings,
        int bf16Roundings = 1) =>
        Expect.Close(
            what, actual.Read(), before is null ? expected : before.Plus(expected),
            before is null ? magnitude : before.Abs().Plus(magnitude), roundings, bf16Roundings);

    // Every fifth is a zero, of either sign.
    private static Matrix WithZeros(Matrix values)
    {
        for (int i = 0; i < values.Values.Length; i += 5)
        {
            values.Values[i] = i % 2 == 0 ? 0 : -0.0;
        }

        return values;
    }

    private static Matrix Nan(int rows, int columns) => Matrix.Filled(rows, columns, double.NaN);

    // exp(-g) carries a relative error that grows with |g|.
    private static Matrix SiluMagnitude(Matrix gate, Matrix factor) =>
        Combine(Reference.SiluGate(gate, factor), gate, gate, (y, g, _) => Math.Abs(y) * (1 + Math.Abs(g)));

    // Below -88 exp(-x) is more than an F32 holds, so that a result of less than 4e-37 may be zero.
    private static double Vanished(double x) => x < -88 ? 1e-30 : 0;

    private static Matrix Combine(Matrix a, Matrix b, Matrix c, Func<double, double, double, double> f)
    {
        var result = new Matrix(a.Rows, a.Columns);
        for (int i = 0; i < result.Values.Length; i++)
        {
            result.Values[i] = f(a.Values[i], b.Values[i], c.Values[i]);
        }

        return result;
    }
}
