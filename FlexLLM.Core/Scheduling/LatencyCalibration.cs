using FlexLLM.Primitives;

namespace FlexLLM.Scheduling;

/// <summary>Fits a <see cref="LatencyModel"/> to measured steps.</summary>
internal static class LatencyCalibration
{
    private const int Rounds = 8;
    private const int SweepsMax = 5_000;
    private const double Ridge = 1e-9;

    // Share of the typical step that a term keeps at least, so that later observations can still raise it.
    private const double ShareMin = 1e-4;

    public static LatencyModel Fit(IReadOnlyList<(StepFeatures Features, TimeSpan Time)> measurements)
    {
        if (measurements.Count == 0)
        {
            return LatencyModel.Default;
        }

        const int Terms = LatencyCoefficients.Count;
        double[,] rows = new double[measurements.Count, Terms]; // Factor over measured time: every target is 1.
        double[] factors = new double[Terms];
        double[] scale = new double[Terms];
        for (int m = 0; m < measurements.Count; m++)
        {
            LatencyCoefficients.CopyFactors(measurements[m].Features, factors);
            double seconds = Math.Max(measurements[m].Time.TotalSeconds, 1e-7);
            for (int i = 0; i < Terms; i++)
            {
                rows[m, i] = factors[i] / seconds;
                scale[i] = Math.Max(scale[i], rows[m, i]);
            }
        }

        double[] weights = new double[measurements.Count];
        Array.Fill(weights, 1.0);
        double[] solution = new double[Terms]; // In units of 1 / scale.
        for (int round = 0; round < Rounds; round++)
        {
            Solve(rows, weights, scale, solution);
            Reweigh(rows, scale, solution, weights);
        }

        LatencyCoefficients coefficients = Complete(scale, solution);
        double[] ratios =
            [.. measurements.Select(m => m.Time.TotalSeconds / coefficients.Dot(m.Features)).Order()];
        double tail = ratios[(int)Math.Ceiling(0.95 * ratios.Length) - 1];
        return new LatencyModel(coefficients, Correction: 1.0, Math.Clamp(tail, 1.0, 3.0));
    }

    /// <summary>Coordinate descent on the weighted normal equations, each coordinate held at 0 or above.</summary>
    private static void Solve(double[,] rows, double[] weights, double[] scale, double[] solution)
    {
        int terms = solution.Length;
        double[,] gram = new double[terms, terms];
        double[] target = new double[terms];
        for (int m = 0; m < weights.Length; m++)
        {
            for (int i = 0; i < terms; i++)
            {
                double a = scale[i] > 0.0 ? rows[m, i] / scale[i] : 0.0;
                target[i] += weights[m] * a;
                for (int j = 0; j < terms; j++)
                {
                    gram[i, j] += scale[j] > 0.0 ? weights[m] * a * rows[m, j] / scale[j] : 0.0;
                }
            }
        }

        for (int sweep = 0; sweep < SweepsMax; sweep++)
        {
            double moved = 0.0;
            for (int i = 0; i < terms; i++)
            {
                if (gram[i, i] <= 0.0)
                {
                    continue;
                }

                double rest = target[i];
                for (int j = 0; j < terms; j++)
                {
                    rest -= j == i ? 0.0 : gram[i, j] * solution[j];
                }

                double next = Math.Max(0.0, rest / (gram[i, i] + Ridge));
                moved = Math.Max(moved, Math.Abs(next - solution[i]));
                solution[i] = next;
            }

            if (moved < 1e-12)
            {
                return;
            }
        }
    }

    /// <summary>Huber's weights: full within twice the typical error, falling as its inverse beyond.</summary>
    private static void Reweigh(double[,] rows, double[] scale, double[] solution, double[] weights)
    {
        double[] errors = new double[weights.Length];
        for (int m = 0; m < errors.Length; m++)
        {
            double predicted = 0.0;
            for (int i = 0; i < solution.Length; i++)
            {
                predicted += scale[i] > 0.0 ? rows[m, i] / scale[i] * solution[i] : 0.0;
            }

            errors[m] = Math.Abs(predicted - 1.0);
        }

        double typical = Math.Max(errors.Order().ElementAt(errors.Length / 2), 1e-6);
        for (int m = 0; m < errors.Length; m++)
        {
            weights[m] = Math.Min(1.0, 2.0 * typical / Math.Max(errors[m], 1e-12));
        }
    }

    /// <summary>
    /// Back to seconds. A term that no measurement had is guessed from inference's term of the same unit (a step, a row, a
    /// position), in the default's proportion: a guess far too high would drag the common correction, and every other term
    /// with it.
    /// </summary>
    private static LatencyCoefficients Complete(double[] scale, double[] solution)
    {
        double[] values = new double[solution.Length];
        double[] guess = new double[solution.Length];
        LatencyModel.Default.Coefficients.CopyTo(guess);
        Check.That(scale[0] > 0.0); // Every measurement has the constant term.
        for (int i = 0; i < values.Length; i++)
        {
            int like = i % 3;
            bool known = scale[like] > 0.0 && solution[like] > ShareMin;
            values[i] = scale[i] > 0.0
                ? Math.Max(solution[i], ShareMin) / scale[i]
                : guess[i] * (known ? values[like] / guess[like] : values[0] / guess[0]);
        }

        return LatencyCoefficients.From(values);
    }
}
