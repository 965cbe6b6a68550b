using FlexLLM.Backends;

namespace FlexLLM.Tests.Contracts;

/// <summary>The three products of a bypass matrix.</summary>
internal static class FactorChecks
{
    public static void Narrow(IComputeBackend backend, int rows, int inner, int wide, float scale, bool accumulate)
    {
        using var bench = new Workbench(backend);
        (Matrix x, Matrix m, Matrix before) = (bench.Random(rows, wide), bench.Random(inner, wide), bench.Random(rows, inner));
        Operand u = accumulate ? bench.Target(before) : bench.Output(rows, inner);
        backend.Narrow(bench.Source(x), bench.Factor(m), scale, u, accumulate);
        Matrix magnitude = Reference.Narrow(x.Abs(), m.Abs(), Math.Abs(scale));
        Close("narrow", u, Reference.Narrow(x, m, scale), magnitude, accumulate ? before : null, Expect.Roundings(wide));
        bench.Verify();
    }

    public static void Widen(IComputeBackend backend, int rows, int inner, int wide, float scale, bool accumulate)
    {
        using var bench = new Workbench(backend);
        (Matrix u, Matrix m, Matrix before) = (bench.Random(rows, inner), bench.Random(inner, wide), bench.Random(rows, wide));
        Operand y = accumulate ? bench.Target(before) : bench.Output(rows, wide);
        backend.Widen(bench.Source(u), bench.Factor(m), scale, y, accumulate);
        Matrix magnitude = Reference.Widen(u.Abs(), m.Abs(), Math.Abs(scale));
        Close("widen", y, Reference.Widen(u, m, scale), magnitude, accumulate ? before : null, Expect.Roundings(inner));
        bench.Verify();
    }

    public static void AddOuter(IComputeBackend backend, int rows, int inner, int wide, float scale)
    {
        using var bench = new Workbench(backend);
        (Matrix u, Matrix x, Matrix before) = (bench.Random(rows, inner), bench.Random(rows, wide), bench.Random(inner, wide));
        Operand gradient = bench.Accumulator(before);
        backend.AddOuter(bench.Source(u), bench.Source(x), scale, gradient.Tensor);
        Matrix magnitude = Reference.Outer(u.Abs(), x.Abs(), Math.Abs(scale));
        Close("outer products", gradient, Reference.Outer(u, x, scale), magnitude, before, Expect.Roundings(rows));
        bench.Verify();
    }

    /// <summary>After RefreshFactor, new values count, whichever way the matrix is read.</summary>
    public static void Refresh(IComputeBackend backend)
    {
        using var bench = new Workbench(backend);
        DeviceFactor factor = bench.Factor(bench.Random(3, 11));
        (Matrix x, Matrix u, Matrix m) = (bench.Random(5, 11), bench.Random(5, 3), bench.Random(3, 11));
        backend.Upload(m.ToFloats(), factor.Values);
        backend.RefreshFactor(factor);
        (Operand narrow, Operand wide) = (bench.Output(5, 3), bench.Output(5, 11));
        backend.Narrow(bench.Source(x), factor, 1, narrow, accumulate: false);
        backend.Widen(bench.Source(u), factor, 1, wide, accumulate: false);
        Matrix magnitude = Reference.Narrow(x.Abs(), m.Abs(), 1);
        Close("refreshed, narrow", narrow, Reference.Narrow(x, m, 1), magnitude, null, Expect.Roundings(11));
        magnitude = Reference.Widen(u.Abs(), m.Abs(), 1);
        Close("refreshed, wide", wide, Reference.Widen(u, m, 1), magnitude, null, Expect.Roundings(3));
        bench.Verify();
    }

    private static void Close(
        string what, Operand actual, Matrix expected, Matrix magnitude, Matrix? before, double roundings) =>
        Expect.Close(
            what, actual.Read(), before is null ? expected : before.Plus(expected),
            before is null ? magnitude : before.Abs().Plus(magnitude), roundings);
}
