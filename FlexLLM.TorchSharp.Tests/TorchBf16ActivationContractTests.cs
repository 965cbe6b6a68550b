using FlexLLM.Backends;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>
/// The same with BF16 activations: given numbers that BF16 holds, whatever an operation writes to F32 is within the tolerances of F32, and
/// what it writes to activations within a rounding or two of that.
/// </summary>
[TorchFixture]
internal sealed class TorchBf16ActivationContractTests : TorchCpuContract
{
    protected override DType ActivationType => DType.BF16;

    // Everything else in the contract that is F32 holds numbers that BF16 holds too.
    [Test]
    public void FactorsGainsAndTheirGradients_OfFullWidth_AreNotRounded()
    {
        using var bench = new Workbench(Backend);
        (Matrix x, Matrix u) = (bench.Random(9, 37), bench.Random(9, 4));
        (Matrix m, Matrix gain) = (Matrix.Random(ref bench.Chance, 4, 37), Matrix.Random(ref bench.Chance, 1, 37));
        DeviceFactor factor = bench.Factor(m);
        (Operand narrow, Operand wide) = (bench.Accumulator(new Matrix(9, 4)), bench.Accumulator(new Matrix(9, 37)));
        (Operand gradient, Operand scaled) = (bench.Accumulator(m), bench.Accumulator(new Matrix(9, 37)));
        Backend.Narrow(bench.Source(x), factor, 1, narrow, accumulate: false);
        Backend.Widen(bench.Source(u), factor, 1, wide, accumulate: true);
        Backend.AddOuter(bench.Source(u), bench.Source(x), 1, gradient.Tensor);
        Backend.RmsNorm(bench.Source(x), bench.Constant(gain), 1e-5f, scaled);
        Matrix norm = Reference.RmsNorm(x, gain, 1e-5f);
        Expect.Close("narrow", narrow.Read(), Reference.Narrow(x, m, 1), Reference.Narrow(x.Abs(), m.Abs(), 1), Expect.Roundings(37));
        Expect.Close("widen", wide.Read(), Reference.Widen(u, m, 1), Reference.Widen(u.Abs(), m.Abs(), 1), Expect.Roundings(4));
        Expect.Close("norm", scaled.Read(), norm, norm.Abs(), Expect.Roundings(37));
        Expect.Close(
            "gradient", gradient.Read(), m.Plus(Reference.Outer(u, x, 1)), m.Abs().Plus(Reference.Outer(u.Abs(), x.Abs(), 1)),
            Expect.Roundings(9));
        bench.Verify();
    }

    [Test]
    public void Control_ActivationsThatAreRounded_FailTheTolerancesOfF32()
    {
        using var bench = new Workbench(Backend);
        (Matrix x, Matrix gain) = (bench.Random(9, 37), bench.Random(1, 37));
        Operand y = bench.Output(9, 37);
        Backend.RmsNorm(bench.Source(x), bench.Constant(gain), 1e-5f, y);
        (Matrix actual, Matrix expected) = (y.Read(), Reference.RmsNorm(x, gain, 1e-5f));
        Expect.Close("norm", actual, expected, expected.Abs(), Expect.Roundings(37));
        actual.Type = DType.F32;
        Assert.Throws<AssertionException>(() => Expect.Close("norm", actual, expected, expected.Abs(), Expect.Roundings(37)));
        Assert.Throws<AssertionException>(() => MemoryChecks.Types(Backend, DType.F32, devices: 1));
    }

    protected override IComputeBackend CreateBackend() =>
        TorchBackend.Create("cpu", new TorchOptions { Bf16Activations = true }).CreateBackend();
}
