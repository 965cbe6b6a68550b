namespace FlexLLM.Scheduling;

/// <summary>
/// The size of a step in the terms that its time is linear in. Context: over the rows of a kind, the sum of the positions
/// that each attends. Backward rows count once for each layer.
/// </summary>
internal readonly record struct StepFeatures
{
    public int InferenceRows { get; init; }

    public long InferenceContext { get; init; }

    public int ForwardWindows { get; init; }

    public int ForwardRows { get; init; }

    public long ForwardContext { get; init; }

    public int BackwardItems { get; init; }

    public long BackwardRows { get; init; }

    public long BackwardContext { get; init; }

    /// <summary>
    /// Adds <paramref name="tokens"/> inference rows of one sequence, the first at position <paramref name="start"/>.
    /// </summary>
    public StepFeatures WithInference(int start, int tokens) => this with
    {
        InferenceRows = InferenceRows + tokens,
        InferenceContext = InferenceContext + ContextOf(start, tokens),
    };

    /// <summary>Adds a forward window.</summary>
    public StepFeatures WithForward(int start, int tokens) => this with
    {
        ForwardWindows = ForwardWindows + 1,
        ForwardRows = ForwardRows + tokens,
        ForwardContext = ForwardContext + ContextOf(start, tokens),
    };

    /// <summary>Makes a forward window longer: so many more tokens, the first of them at position <paramref name="start"/>.</summary>
    public StepFeatures WithLongerForward(int start, int tokens) => this with
    {
        ForwardRows = ForwardRows + tokens,
        ForwardContext = ForwardContext + ContextOf(start, tokens),
    };

    /// <summary>Adds a backward window of one layer.</summary>
    public StepFeatures WithBackward(int start, int rows) => this with
    {
        BackwardItems = BackwardItems + 1,
        BackwardRows = BackwardRows + rows,
        BackwardContext = BackwardContext + ContextOf(start, rows),
    };

    // The row at position t attends t + 1 positions.
    private static long ContextOf(int start, int rows) => ((long)rows * start) + ((long)rows * (rows + 1) / 2);
}

/// <summary>
/// Seconds for a step, and for each unit of <see cref="StepFeatures"/>; none is negative, so more work never predicts less time.
/// </summary>
internal readonly record struct LatencyCoefficients(
    double Step, double Row, double Context, double ForwardWindow, double ForwardRow, double ForwardContext,
    double BackwardItem, double BackwardRow, double BackwardContext)
{
    public const int Count = 9;

    /// <summary>Seconds of a step of this size.</summary>
    public double Dot(in StepFeatures x) =>
        Step + (Row * x.InferenceRows) + (Context * x.InferenceContext) + (ForwardWindow * x.ForwardWindows) +
        (ForwardRow * x.ForwardRows) + (ForwardContext * x.ForwardContext) + (BackwardItem * x.BackwardItems) +
        (BackwardRow * x.BackwardRows) + (BackwardContext * x.BackwardContext);

    public void CopyTo(Span<double> values)
    {
        (values[0], values[1], values[2]) = (Step, Row, Context);
        (values[3], values[4], values[5]) = (ForwardWindow, ForwardRow, ForwardContext);
        (values[6], values[7], values[8]) = (BackwardItem, BackwardRow, BackwardContext);
    }

    public static LatencyCoefficients From(ReadOnlySpan<double> v) => new(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]);

    /// <summary>The factors that the coefficients multiply; the first is 1.</summary>
    public static void CopyFactors(in StepFeatures x, Span<double> values)
    {
        (values[0], values[1], values[2]) = (1.0, x.InferenceRows, x.InferenceContext);
        (values[3], values[4], values[5]) = (x.ForwardWindows, x.ForwardRows, x.ForwardContext);
        (values[6], values[7], values[8]) = (x.BackwardItems, x.BackwardRows, x.BackwardContext);
    }
}

/// <summary>
/// Predicts how long a step takes: linear in its size, times a correction that follows the machine, times a tail that about
/// 99 % of the steps stay under. Immutable: an observation makes a new model.
/// </summary>
/// <param name="Coefficients">The linear part, in seconds.</param>
/// <param name="Correction">Measured over linear prediction, a moving geometric mean.</param>
/// <param name="Tail">About the 99th percentile of measured over expected; 1 or more.</param>
internal readonly record struct LatencyModel(LatencyCoefficients Coefficients, double Correction, double Tail)
{
    private const double Quantile = 0.99;
    private const double TailStep = 0.02;
    private const double TailMax = 3.0;
    private const double CorrectionRate = 0.1;
    private const double LearningRate = 0.02;

    // One measurement counts as at most this far off: a page fault or a collection moves little, a slower machine is
    // still learnt within some dozens of steps.
    private const double SurpriseMax = 2.0;

    /// <summary>A guess for a machine that was never measured: careful, and corrected by the first steps.</summary>
    public static LatencyModel Default { get; } = new(
        new LatencyCoefficients(
            Step: 5e-3, Row: 1e-3, Context: 1e-7, ForwardWindow: 2e-3, ForwardRow: 1e-3, ForwardContext: 1e-7,
            BackwardItem: 1e-3, BackwardRow: 1e-4, BackwardContext: 1e-8),
        Correction: 1.0,
        Tail: 1.5);

    /// <summary>The time that about 99 % of such steps stay under. Grows with every feature.</summary>
    public TimeSpan Predict(in StepFeatures features) => ToTime(Coefficients.Dot(features) * Correction * Tail);

    /// <summary>The time that such a step takes in the middle.</summary>
    public TimeSpan Expect(in StepFeatures features) => ToTime(Coefficients.Dot(features) * Correction);

    /// <summary>The model after a step of this size took this long (execution alone, no waiting for work).</summary>
    public LatencyModel Observe(in StepFeatures features, TimeSpan measured)
    {
        double linear = Coefficients.Dot(features);
        if (linear <= 0.0) // A model without a term for this work has nothing to scale.
        {
            return this;
        }

        double seconds = Math.Max(measured.TotalSeconds, 1e-7);
        double ratio = seconds / (linear * Correction);
        double surprise = Math.Clamp(ratio, 1.0 / SurpriseMax, SurpriseMax);

        // A random walk whose two steps balance when one ratio in a hundred is above.
        double tail = Tail * Math.Exp(TailStep * (ratio > Tail ? Quantile : Quantile - 1.0));
        return new LatencyModel(
            Learn(features, linear, surprise - 1.0),
            Math.Clamp(Correction * Math.Pow(surprise, CorrectionRate), 1e-4, 1e4),
            Math.Clamp(tail, 1.0, TailMax));
    }

    /// <summary>Least squares on relative errors with no negative coefficient; single wild measurements count little.</summary>
    /// <param name="measurements">Steps that cover the sizes to be predicted; kinds of work that none has are guessed.</param>
    public static LatencyModel FromCalibration(IReadOnlyList<(StepFeatures Features, TimeSpan Time)> measurements) =>
        LatencyCalibration.Fit(measurements);

    /// <summary>
    /// One step of normalised least mean squares in which each coefficient is measured in units of itself: a term learns in
    /// proportion to its share of the prediction, none turns negative, and what a step does not use stays.
    /// </summary>
    private LatencyCoefficients Learn(in StepFeatures features, double linear, double error)
    {
        Span<double> values = stackalloc double[LatencyCoefficients.Count];
        Span<double> factors = stackalloc double[LatencyCoefficients.Count];
        Coefficients.CopyTo(values);
        LatencyCoefficients.CopyFactors(features, factors);
        double power = 0.0;
        for (int i = 0; i < values.Length; i++)
        {
            factors[i] *= values[i] / linear; // Now the term's share.
            power += factors[i] * factors[i];
        }

        for (int i = 0; i < values.Length; i++)
        {
            values[i] *= Math.Max(1.0 + (LearningRate * error * factors[i] / power), 0.5);
        }

        return LatencyCoefficients.From(values);
    }

    private static TimeSpan ToTime(double seconds) => TimeSpan.FromTicks((long)Math.Min(seconds * TimeSpan.TicksPerSecond, 1e15));
}
