using FlexLLM.Backends;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>
/// A serial adapter, y = h + act(h Down^T + b) Up + c, put together from the small operations, its gradients against central
/// differences of the same in double. Shows how the pieces fit, and that nothing is missing.
/// </summary>
internal static class CompositionChecks
{
    private const int Rows = 5;
    private const int Inner = 3;
    private const int Wide = 11;

    public static void Adapter(IComputeBackend backend, bool silu)
    {
        using var bench = new Workbench(backend);
        (Matrix h, Matrix dy) = (bench.Random(Rows, Wide), bench.Random(Rows, Wide));
        (Matrix down, Matrix up) = (bench.Random(Inner, Wide), bench.Random(Inner, Wide));
        (Matrix b, Matrix c) = (bench.Random(1, Inner), bench.Random(1, Wide));
        (DeviceFactor deviceDown, DeviceFactor deviceUp) = (bench.Factor(down), bench.Factor(up));
        (Operand input, Operand gradient) = (bench.Source(h), bench.Source(dy));
        (Operand pre, Operand inside, Operand y) =
            (bench.Output(Rows, Inner), bench.Output(Rows, Inner), bench.Output(Rows, Wide));

        backend.Narrow(input, deviceDown, 1, pre, accumulate: false);
        backend.AddBias(pre, bench.Constant(b));
        if (silu)
        {
            backend.Silu(pre, inside);
        }
        else
        {
            backend.Relu(pre, inside);
        }

        backend.Copy(input, y);
        backend.Widen(inside, deviceUp, 1, y, accumulate: true);
        backend.AddBias(y, bench.Constant(c));

        (Operand gradDown, Operand gradUp) =
            (bench.Accumulator(new Matrix(Inner, Wide)), bench.Accumulator(new Matrix(Inner, Wide)));
        (Operand gradB, Operand gradC) = (bench.Accumulator(new Matrix(1, Inner)), bench.Accumulator(new Matrix(1, Wide)));
        (Operand du, Operand dh) = (bench.Output(Rows, Inner), bench.Output(Rows, Wide));
        backend.AddColumnSums(gradient, gradC.Tensor);
        backend.AddOuter(inside, gradient, 1, gradUp.Tensor);
        backend.Narrow(gradient, deviceUp, 1, du, accumulate: false);
        if (silu)
        {
            backend.SiluBackward(pre, du, du);
        }
        else
        {
            DeviceTensor signs = bench.Packed(Rows, Inner, PackedFormat.SignBits);
            backend.Pack(pre, PackedFormat.SignBits, signs);
            backend.Unpack(signs, PackedFormat.SignBits, pre);
            backend.ReluBackward(pre, du, du);
        }

        backend.AddColumnSums(du, gradB.Tensor);
        backend.AddOuter(du, input, 1, gradDown.Tensor);
        backend.Copy(gradient, dh);
        backend.Widen(du, deviceDown, 1, dh, accumulate: true);

        double tolerance = input.Tensor.Type == DType.F32 ? 1e-5 : 0.05;
        Compare("y", y, Forward());
        Compare("gradient of Down", gradDown, Numeric(down));
        Compare("gradient of Up", gradUp, Numeric(up));
        Compare("gradient of b", gradB, Numeric(b));
        Compare("gradient of c", gradC, Numeric(c));
        Compare("gradient of h", dh, Numeric(h));
        bench.Verify();

        Matrix Forward()
        {
            Matrix u = Reference.AddBias(Reference.Narrow(h, down, 1), b);
            return Reference.AddBias(h.Plus(Reference.Widen(silu ? Reference.Silu(u) : Reference.Relu(u), up, 1)), c);
        }

        Matrix Numeric(Matrix of) => ReferenceTests.NumericGradient(() => Forward().Dot(dy), of);

        void Compare(string what, Operand actual, Matrix expected) =>
            Assert.That(actual.Read().Values, Is.EqualTo(expected.Values).Within(tolerance), what);
    }
}
