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

    // What terms that are alike are held to each other with, where measurements say little: as far apart as their size weighs as much
    // as this error in one measurement.
    private const double AlikeError = 0.05;

    // A term of less than this share of a step's time may differ by that much too.
    private const double AlikeShareMin = 0.003;

    // Errors below this are no outliers, however well the rest fits.
    private const double ErrorMin = 0.01;

    // Medians of some dozens of steps in a quiet moment say little about the tail: real steps teach it, from the careful side.
    private const double TailMin = 1.1;
    private const double TailMax = 1.5;

    private static readonly (LatencyTerm First, LatencyTerm Last)[] Curves =
    [
        (LatencyTerm.RowsTo8, LatencyTerm.RowsBeyond), (LatencyTerm.BackwardRowsTo32, LatencyTerm.BackwardRowsBeyond),
    ];

    // Backward, attention is five products to the forward pass's two, and a layer's weights are one.
    private const double BackwardContextFactor = 2.5;

    /// <summary>What <see cref="LatencyModel.FromCalibration"/> promises.</summary>
    public static LatencyModel Fit(IReadOnlyList<(StepFeatures Features, TimeSpan Time)> measurements, double contextPerRow)
    {
        if (measurements.Count == 0)
        {
            return LatencyModel.Default;
        }

        (StepFeatures Features, double Seconds)[] medians = [.. measurements.GroupBy(m => m.Features, m => m.Time)
            .Select(g => (g.Key, Math.Max(g.Order().ElementAt(g.Count() / 2).TotalSeconds, 1e-7)))];
        const int Terms = LatencyCoefficients.Count;
        double[,] rows = new double[medians.Length, Terms]; // Factor over measured time: every target is 1.
        double[] factors = new double[Terms];
        for (int m = 0; m < medians.Length; m++)
        {
            LatencyCoefficients.CopyFactors(medians[m].Features, factors);
            for (int i = 0; i < Terms; i++)
            {
                rows[m, i] = factors[i] / medians[m].Seconds;
            }
        }

        // First what is alike as one, each curve as a straight line; then one by one, pulled towards that.
        double[] likeness = LikenessOf(contextPerRow);
        double[] line = Untie(SolveRobust(Tie(rows, likeness), new double[Terms], isHeld: false), likeness);
        double[] values = SolveRobust(rows, line, isHeld: true);
        LatencyCoefficients coefficients = Complete(ScalesOf(rows), values);
        double[] ratios = [.. measurements.Select(m => m.Time.TotalSeconds / coefficients.Dot(m.Features)).Order()];
        double tail = ratios[(int)Math.Ceiling(0.95 * ratios.Length) - 1];
        return new LatencyModel(coefficients, Correction: 1.0, Math.Clamp(tail, TailMin, TailMax));
    }

    private static double[] ScalesOf(double[,] rows) =>
        [.. Enumerable.Range(0, rows.GetLength(1)).Select(i => Enumerable.Range(0, rows.GetLength(0)).Max(m => rows[m, i]))];

    /// <summary>
    /// Of each term, how many times the slope of its curve it is; 0 for one of its own. Steps of a few rows and few positions, which
    /// are all that a short profile has, cannot tell what attending costs from what rows cost: arithmetic can.
    /// </summary>
    private static double[] LikenessOf(double contextPerRow)
    {
        double[] likeness = new double[LatencyCoefficients.Count];
        foreach ((LatencyTerm first, LatencyTerm last) in Curves)
        {
            likeness.AsSpan((int)first..((int)last + 1)).Fill(1.0);
        }

        likeness[(int)LatencyTerm.Positions] = contextPerRow; // A guess, and not too large a one: only its traffic counts.
        likeness[(int)LatencyTerm.Context] = likeness[(int)LatencyTerm.ForwardContext] = contextPerRow;
        likeness[(int)LatencyTerm.BackwardContext] = contextPerRow * BackwardContextFactor;
        return likeness;
    }

    private static int CurveOf(int term) => (int)Curves[term >= (int)LatencyTerm.BackwardItem ? 1 : 0].First;

    /// <summary>The same rows with all that is alike in one term.</summary>
    private static double[,] Tie(double[,] rows, double[] likeness)
    {
        double[,] tied = new double[rows.GetLength(0), rows.GetLength(1)];
        for (int m = 0; m < rows.GetLength(0); m++)
        {
            for (int i = 0; i < likeness.Length; i++)
            {
                tied[m, likeness[i] > 0.0 ? CurveOf(i) : i] += rows[m, i] * (likeness[i] > 0.0 ? likeness[i] : 1.0);
            }
        }

        return tied;
    }

    private static double[] Untie(double[] values, double[] likeness) =>
        [.. values.Select((value, i) => likeness[i] > 0.0 ? values[CurveOf(i)] * likeness[i] : 0.0)];

    /// <summary>Seconds for each term, none negative, near the prior, where there is one, as far as the rows leave a choice.</summary>
    private static double[] SolveRobust(double[,] rows, double[] prior, bool isHeld)
    {
        double[] scale = ScalesOf(rows);
        double[] weights = new double[rows.GetLength(0)];
        Array.Fill(weights, 1.0);
        double[] expected = [.. prior.Zip(scale, (value, unit) => value * unit)];
        double[] solution = [.. expected]; // In units of 1 / scale.
        double[] ridge = [.. prior.Zip(expected, (value, share) =>
            isHeld && value > 0.0 ? Math.Pow(AlikeError / Math.Max(share, AlikeShareMin), 2.0) : Ridge)];
        for (int round = 0; round < Rounds; round++)
        {
            Solve(rows, weights, scale, expected, ridge, solution);
            Reweigh(rows, scale, solution, weights);
        }

        return [.. solution.Zip(scale, (value, unit) => unit > 0.0 ? value / unit : 0.0)];
    }

    /// <summary>Coordinate descent on the weighted normal equations, each coordinate held at 0 or above.</summary>
    private static void Solve(
        double[,] rows, double[] weights, double[] scale, double[] expected, double[] ridge, double[] solution)
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

                double next = Math.Max(0.0, (rest + (ridge[i] * expected[i])) / (gram[i, i] + ridge[i]));
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

        double typical = Math.Max(errors.Order().ElementAt(errors.Length / 2), ErrorMin);
        for (int m = 0; m < errors.Length; m++)
        {
            weights[m] = Math.Min(1.0, 2.0 * typical / Math.Max(errors[m], 1e-12));
        }
    }

    /// <summary>
    /// Fills in what no measurement had. A curve goes on as it was last seen. Another term is guessed from inference's term of the
    /// same unit (a step, a row, a position), in the default's proportion: a guess far too high would drag the common correction,
    /// and every other term with it.
    /// </summary>
    private static LatencyCoefficients Complete(double[] scale, double[] values)
    {
        double[] guess = new double[values.Length];
        LatencyModel.Default.Coefficients.CopyTo(guess);
        Check.That(scale[(int)LatencyTerm.Step] > 0.0); // Every measurement has the constant term.
        double[] complete = [.. values];
        for (int i = 0; i < values.Length; i++)
        {
            bool continues = Curves.Any(c => i > (int)c.First && i <= (int)c.Last) && complete[i - 1] > 0.0;
            complete[i] = scale[i] > 0.0 ? Math.Max(values[i], ShareMin / scale[i])
                : continues ? complete[i - 1]
                : guess[i] * FactorLike((LatencyTerm)i);
        }

        return LatencyCoefficients.From(complete);

        double FactorLike(LatencyTerm term)
        {
            double like = term switch
            {
                LatencyTerm.Positions => 0.0,
                LatencyTerm.Context or LatencyTerm.ForwardContext or LatencyTerm.BackwardContext => Over(LatencyTerm.Context),
                LatencyTerm.Step or LatencyTerm.Head or LatencyTerm.ForwardWindow or LatencyTerm.BackwardItem => 0.0,
                _ => RowFactor(),
            };
            return like > 0.0 ? like : StepFactor();
        }

        double Over(LatencyTerm term) =>
            scale[(int)term] > 0.0 && values[(int)term] * scale[(int)term] > ShareMin ? values[(int)term] / guess[(int)term] : 0.0;

        // The slope of the largest batches: the first rows of a curve may cost nothing at all.
        double RowFactor()
        {
            for (int i = (int)LatencyTerm.RowsBeyond; i >= (int)LatencyTerm.RowsTo8; i--)
            {
                if (Over((LatencyTerm)i) is > 0.0 and double factor)
                {
                    return factor;
                }
            }

            return 0.0;
        }

        double StepFactor() =>
            (values[(int)LatencyTerm.Step] + values[(int)LatencyTerm.RowsTo1]) / guess[(int)LatencyTerm.Step];
    }
}
