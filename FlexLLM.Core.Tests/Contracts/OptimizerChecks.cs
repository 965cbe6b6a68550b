using FlexLLM.Backends;

namespace FlexLLM.Tests.Contracts;

/// <summary>Three optimizer steps with fresh gradients, against PyTorch's rules in double.</summary>
internal static class OptimizerChecks
{
    private const int Steps = 3;

    public static void Sgd(IComputeBackend backend, int rows, int columns, SgdStepOptions options)
    {
        using var bench = new Workbench(backend);
        Matrix parameter = bench.Random(rows, columns);
        Matrix? velocity = options.Momentum == 0 ? null : new Matrix(rows, columns);
        Operand deviceParameter = bench.Accumulator(parameter);
        Operand? deviceVelocity = velocity is null ? null : bench.Accumulator(velocity);
        for (int step = 0; step < Steps; step++)
        {
            Matrix gradient = bench.Random(rows, columns);
            backend.SgdStep(deviceParameter.Tensor, bench.Constant(gradient), deviceVelocity?.Tensor, options);
            Reference.SgdStep(parameter, gradient, velocity, options);
        }

        // All terms are of order 1, and each step rounds a handful of times.
        Matrix magnitude = Matrix.Filled(rows, columns, 1 + options.WeightDecay);
        Expect.Close("parameter", deviceParameter.Read(), parameter, magnitude, 4 * Steps);
        if (velocity is not null)
        {
            Expect.Close("velocity", deviceVelocity!.Read(), velocity, magnitude, 4 * Steps * Steps);
        }

        bench.Verify();
    }

    public static void AdamW(IComputeBackend backend, int rows, int columns, AdamWStepOptions options)
    {
        using var bench = new Workbench(backend);
        Matrix parameter = bench.Random(rows, columns);
        (Matrix m, Matrix v) = (new Matrix(rows, columns), new Matrix(rows, columns));
        (Operand deviceParameter, Operand deviceM, Operand deviceV) =
            (bench.Accumulator(parameter), bench.Accumulator(m), bench.Accumulator(v));
        Matrix travelled = parameter.Abs();
        for (int step = 0; step < Steps; step++)
        {
            // A gradient of zero is common: LoRA's A on the first step.
            Matrix gradient = bench.Random(rows, columns).Map(value => Math.Abs(value) < 0.05 ? 0 : value);
            AdamWStepOptions now = options with { Step = options.Step + step };
            backend.AdamWStep(
                deviceParameter.Tensor, bench.Constant(gradient), deviceM.Tensor, deviceV.Tensor, now);
            Matrix before = parameter.Copy();
            Reference.AdamWStep(parameter, gradient, m, v, now);
            travelled = travelled.Plus(parameter.Plus(before.Map(value => -value)).Abs());
        }

        Matrix moment = Matrix.Filled(rows, columns, 1);
        Expect.Close("parameter", deviceParameter.Read(), parameter, travelled.Map(value => value + 0.1), 6 * Steps);
        Expect.Close("moment 1", deviceM.Read(), m, moment, 3 * Steps);
        Expect.Close("moment 2", deviceV.Read(), v, v, 6 * Steps);
        bench.Verify();
    }
}
