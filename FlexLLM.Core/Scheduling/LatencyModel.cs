namespace FlexLLM.Scheduling;

/// <summary>
/// Predicts how long a step takes: a sum over the terms of its size, times a correction that follows the machine, times a tail
/// that more than 99 % of the steps stay under. Immutable: an observation makes a new model.
/// </summary>
/// <param name="Coefficients">The sum, in seconds.</param>
/// <param name="Correction">Measured over that sum, a moving geometric mean.</param>
/// <param name="Tail">A little more than the 99th percentile of measured over expected; 1 or more.</param>
internal readonly record struct LatencyModel(LatencyCoefficients Coefficients, double Correction, double Tail)
{
    // Half of the one in a hundred that is promised: steps follow each other in noise that comes and goes.
    private const double Quantile = 0.995;
    private const double TailStep = 0.02;

    // A young tail may be far off, and comes near in steps that shrink with their number: 8 / n is what finds a quantile that one
    // error in two hundred exceeds fastest where errors are of an eighth (1 / (n * their density there)).
    private const double TailStepMax = 0.05;
    private const double TailSteps = 8.0;
    private const double CorrectionRate = 0.1;
    private const double LearningRate = 0.02;

    // Errors that all point one way are a machine that changed, or work unlike any before: the correction then runs after them,
    // and the tail, which is there for chance, waits. One wild measurement alone does not come that far.
    private const double DriftRate = 0.2;
    private const double DriftMin = 0.15;
    private const double DriftCorrectionRate = 0.3;

    // An error beside finetuning is four times as likely its own (another job, another adapter) as the whole machine's.
    private const double BlameFinetuning = 4.0;
    private const double SecondsMax = 1e5;

    // One measurement counts as at most this far off: a page fault or a collection moves little, a slower machine is
    // still learnt within some dozens of steps.
    private const double SurpriseMax = 2.0;

    /// <summary>Bounds of <see cref="Tail"/> and <see cref="Correction"/>.</summary>
    public const double TailMax = 3.0;

    public const double CorrectionMax = 1e4;

    /// <summary>Moving mean of the logarithm of measured over expected: near 0 while errors are chance.</summary>
    public double Drift { get; init; }

    /// <summary>Steps that <see cref="Tail"/> has followed since this engine has the model.</summary>
    public long Followed { get; init; }

    /// <summary>A guess for a machine that was never measured: careful, and corrected by the first steps.</summary>
    public static LatencyModel Default { get; } = new(
        LatencyCoefficients.Linear(
            step: 5e-3, row: 1e-3, context: 1e-7, forwardWindow: 2e-3, forwardRow: 1.3e-3, forwardContext: 1e-7,
            backwardItem: 1e-3, backwardRow: 1e-4, backwardContext: 1e-8)
            .With(LatencyTerm.Positions, 1e-8).With(LatencyTerm.Head, 1e-3).With(LatencyTerm.HeadRow, 1e-4),
        Correction: 1.0,
        Tail: 1.5);

    /// <summary>The time that more than 99 % of such steps stay under. Grows with every feature.</summary>
    public TimeSpan Predict(in StepFeatures features) => ToTime(Coefficients.Dot(features) * Correction * Tail);

    /// <summary>
    /// The part of the predicted time that more rows do not add to: the first pass over weights, and what windows and items cost
    /// by themselves.
    /// </summary>
    public TimeSpan PredictFixed(in StepFeatures features)
    {
        double seconds = (Coefficients[LatencyTerm.ForwardWindow] * features.ForwardWindows) +
            (Coefficients[LatencyTerm.BackwardItem] * features.BackwardItems) +
            (features.BatchRows > 0 ? Coefficients[LatencyTerm.RowsTo1] : 0.0);
        return ToTime(seconds * Correction * Tail);
    }

    /// <summary>The time that such a step takes in the middle.</summary>
    public TimeSpan Expect(in StepFeatures features) => ToTime(Coefficients.Dot(features) * Correction);

    /// <summary>The model after a step of this size took this long (execution alone, no waiting for work).</summary>
    public LatencyModel Observe(in StepFeatures features, TimeSpan measured)
    {
        double sum = Coefficients.Dot(features);
        if (sum <= 0.0) // A model without a term for this work has nothing to scale.
        {
            return this;
        }

        double seconds = Math.Max(measured.TotalSeconds, 1e-7);
        double ratio = seconds / (sum * Correction);
        double surprise = Math.Clamp(ratio, 1.0 / SurpriseMax, SurpriseMax);

        double drift = Drift + (DriftRate * (Math.Log(surprise) - Drift));
        bool drifts = Math.Abs(drift) > Math.Max(DriftMin, Math.Log(Tail) / 2.0);

        // A random walk whose two steps balance when one ratio in two hundred is above.
        double step = Math.Clamp(TailSteps / (Followed + 1), TailStep, TailStepMax);
        double tail = drifts ? Tail : Tail * Math.Exp(step * (ratio > Tail ? Quantile : Quantile - 1.0));
        (LatencyCoefficients learnt, double blame) = Learn(features, sum, surprise, drifts ? DriftCorrectionRate : CorrectionRate);
        return new LatencyModel(
            learnt,
            Math.Clamp(Correction * Math.Pow(surprise, blame), 1.0 / CorrectionMax, CorrectionMax),
            Math.Clamp(tail, 1.0, TailMax))
        {
            Drift = drift,
            Followed = Followed + (drifts ? 0 : 1),
        };
    }

    /// <summary>
    /// Least squares on relative errors with no negative coefficient; single wild measurements count little.
    /// </summary>
    /// <param name="measurements">
    /// Steps that cover the sizes to be predicted, each as often as it was measured; kinds of work that none has are guessed.
    /// </param>
    /// <param name="contextPerRow">
    /// About what it costs to attend to one more position over what one more row costs, by the model's arithmetic.
    /// </param>
    public static LatencyModel FromCalibration(
        IReadOnlyList<(StepFeatures Features, TimeSpan Time)> measurements, double contextPerRow = 1e-4) =>
        LatencyCalibration.Fit(measurements, contextPerRow);

    /// <summary>
    /// One step of normalised least mean squares in which each coefficient is measured in units of itself: a term learns in
    /// proportion to its share of the prediction, none turns negative, and what a step does not use stays. Besides, forward and
    /// backward work each follow the error as a whole, by their shares; the rest of the rate is the common correction's. All of them
    /// follow its logarithm: if one came to rest at another mean than the next, they would drift apart on noise alone, and steps of
    /// seldom used terms would be foretold wrong.
    /// </summary>
    private (LatencyCoefficients Learnt, double Blame) Learn(in StepFeatures features, double sum, double surprise, double rate)
    {
        Span<double> values = stackalloc double[LatencyCoefficients.Count];
        Span<double> factors = stackalloc double[LatencyCoefficients.Count];
        Coefficients.CopyTo(values);
        LatencyCoefficients.CopyFactors(features, factors);
        double power = 0.0;
        double forward = 0.0;
        double backward = 0.0;
        for (int i = 0; i < values.Length; i++)
        {
            factors[i] *= values[i] / sum; // Now the term's share.
            power += factors[i] * factors[i];
            forward += IsForward(i) ? factors[i] : 0.0;
            backward += IsBackward(i) ? factors[i] : 0.0;
        }

        double all = 1.0 + (BlameFinetuning * ((forward * forward) + (backward * backward)));
        double ofForward = Math.Pow(surprise, rate * BlameFinetuning * forward / all);
        double ofBackward = Math.Pow(surprise, rate * BlameFinetuning * backward / all);
        for (int i = 0; i < values.Length; i++)
        {
            double whole = IsForward(i) ? ofForward : IsBackward(i) ? ofBackward : 1.0;
            double own = Math.Pow(surprise, LearningRate * factors[i] / power);
            values[i] = Math.Min(values[i] * whole * own, SecondsMax);
        }

        return (LatencyCoefficients.From(values), rate / all);
    }

    private static bool IsForward(int term) => (LatencyTerm)term is >= LatencyTerm.ForwardWindow and <= LatencyTerm.ForwardContext;

    private static bool IsBackward(int term) => (LatencyTerm)term >= LatencyTerm.BackwardItem;

    private static TimeSpan ToTime(double seconds) => TimeSpan.FromTicks((long)Math.Min(seconds * TimeSpan.TicksPerSecond, 1e15));
}
