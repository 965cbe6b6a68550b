using FlexLLM.Finetuning;
using FlexLLM.Scheduling;
using static FlexLLM.Engine.StepTimer;

namespace FlexLLM.Engine;

/// <summary>
/// Chooses steps that tell a machine's speed in little time, so that the first real ones are planned from it. Where the device has no
/// memory to spare for a job, finetuning is left to be guessed.
/// </summary>
internal sealed class LatencyProfiler(StepTimer steps)
{
    // Default time of a profile: so many steps of one token, within limits. A large model needs longer for the same steps.
    private const double TokensInTime = 200;
    private static readonly TimeSpan TimeLeast = TimeSpan.FromSeconds(2);
    private static readonly TimeSpan TimeMost = TimeSpan.FromSeconds(10);

    // The fewest that make a model, measured even when the time is up.
    private const int MeasuredMin = 3;

    // As many as a median needs; small models reach it long before the time is up.
    private const int RoundsMax = 6;
    private const int RoundsSmall = 3;
    private const int SamplesInTime = 4; // The first one unseen.
    private const int LayersInParts = 8;

    // The part of the time that may go by before anything counts, what does in any case, as the runtime waits a while before it compiles
    // again, and how near a turn must be to the one before it.
    private const double WarmUpShare = 0.3;
    private const double WarmUpShareMin = 0.2;
    private const double WarmRatio = 0.9;

    // A token forward and backward costs at most about this many rows of a batch.
    private const double CostOfTraining = 4.0;

    private readonly List<(StepFeatures Features, TimeSpan Time)> _measured = [];

    /// <summary>
    /// A model of this machine, from what can be measured in the given time, by default 200 steps of one token, 2 to 10 seconds; null
    /// where that is zero. A step that is under way when the time is up is finished, and the first few small ones are always made.
    /// </summary>
    public LatencyModel? Profile(TimeSpan? time)
    {
        if (time == TimeSpan.Zero)
        {
            return null;
        }

        long begun = steps.Clock.GetTimestamp();
        TimeSpan timeMax = time ?? DefaultTime();
        _measured.Clear();

        WarmUp(timeMax * WarmUpShareMin, timeMax * WarmUpShare);
        TrainingRun? run = null;
        try
        {
            for (int round = 0; round < RoundsMax && (TimeLeft() > TimeSpan.Zero || round == 0); round++)
            {
                // Of the first round, a half is finetuning's.
                ProfileInference(
                    round < RoundsSmall ? SmallGrid() : SmallGrid().Concat(LargeGrid()),
                    () => TimeLeft() - (round == 0 ? timeMax / 2 : TimeSpan.Zero));
                if (round == 0)
                {
                    run = steps.TryStart(SampleTokens(TimeLeft()));
                    Touch(run);
                }

                if (run is not null)
                {
                    ProfileSample(run, round, TimeLeft);
                }
            }
        }
        finally
        {
            steps.End(run);
        }

        return _measured.Count >= MeasuredMin
            ? LatencyModel.FromCalibration(_measured, ContextPerRow(steps.Config))
            : null; // Limits so tight that nothing fits.

        TimeSpan TimeLeft() => timeMax - steps.Clock.GetElapsedTime(begun);
    }

    // The first token touches every weight for the first time.
    private TimeSpan DefaultTime()
    {
        Inference[] token = Decodes(1, 0);
        TimeSpan first = steps.Measure(token, run: null, 0, []).Time;
        TimeSpan second = steps.Measure(token, run: null, 0, []).Time;
        TimeSpan wanted = (first < second ? first : second) * TokensInTime;
        return wanted < TimeLeast ? TimeLeast : wanted > TimeMost ? TimeMost : wanted;
    }

    // Products with keys and values over products with weights. The former are smaller and take about twice as long for their size.
    private static double ContextPerRow(ModelConfig config)
    {
        double query = config.AttentionHeads * config.HeadDim;
        double weights = (2.0 * config.HiddenSize * (query + (config.KeyValueHeads * config.HeadDim))) +
            (3.0 * config.HiddenSize * config.IntermediateSize);
        return 2.0 * (2.0 * query / weights);
    }

    // The most telling first: where a step's time starts, where rows begin to count, and how requests decode together.
    private static IEnumerable<Inference[]> SmallGrid() =>
        [Decodes(1, 32), [new(0, 32, true)], [new(0, 8, true)], Decodes(8, 32), Decodes(1, 1000), [new(0, 64, true)], Decodes(4, 128)];

    // What costs much, when there are medians of the others.
    private static IEnumerable<Inference[]> LargeGrid() =>
    [
        [new(0, 128, true)], Decodes(16, 256), [new(448, 64, true)], [new(0, 256, true)], Decodes(32, 64), [new(0, 64, false)],
        [.. Decodes(8, 200), new(0, 100, true)], [new(0, 512, true)], [new(0, 1024, true)],
    ];

    // The first steps compile code, which the runtime does again and better for what it sees often, and touch every weight and buffer
    // for the first time: they say nothing about later ones. All kinds of work in small, until they get no faster.
    private void WarmUp(TimeSpan least, TimeSpan most)
    {
        long start = steps.Clock.GetTimestamp();
        TimeSpan before = TimeSpan.MaxValue;
        while (steps.Clock.GetElapsedTime(start) < most)
        {
            long begun = steps.Clock.GetTimestamp();
            foreach (Inference[] step in new[] { Decodes(1, 0), Decodes(8, 9), [new(0, 7, true)] }.Where(steps.Fits))
            {
                steps.Measure(step, run: null, 0, []);
            }

            TrainTiny();
            TimeSpan took = steps.Clock.GetElapsedTime(begun);
            if (took > before * WarmRatio && steps.Clock.GetElapsedTime(start) >= least)
            {
                return;
            }

            before = took;
        }
    }

    private void TrainTiny()
    {
        TrainingRun? run = steps.TryStart(SampleTokensMin);
        try
        {
            Train(run, SampleTokensMin / 2);
        }
        finally
        {
            steps.End(run);
        }
    }

    // Activations of a sample are used for the first time once in the life of a job.
    private void Touch(TrainingRun? run) => Train(run, SampleTokensMax);

    // One sample, in windows and items of at most so many rows.
    private void Train(TrainingRun? run, int rowsMax)
    {
        while (run is { Cursor.Phase: TrainingPhase.Forward })
        {
            int left = run.Cursor.Sample.Ids.Length - run.Cursor.PositionsDone;
            steps.Measure([], run, Math.Min(Math.Min(rowsMax, left), steps.Limits.TokensPerStepMax), []);
        }

        while (run is { Cursor.Phase: TrainingPhase.Backward })
        {
            steps.Measure([], run, 0, [Math.Min(run.Cursor.RowsLeft, Math.Min(rowsMax, steps.Limits.BackwardRowsMax))]);
        }
    }

    private void ProfileInference(IEnumerable<Inference[]> grid, Func<TimeSpan> timeLeft)
    {
        foreach (Inference[] step in grid.Where(steps.Fits))
        {
            if (TimeOf(step.Sum(i => i.Rows)) < timeLeft() || _measured.Count < MeasuredMin)
            {
                steps.Touch(step);
                _measured.Add(steps.Measure(step, run: null, 0, []));
            }
        }
    }

    /// <summary>
    /// A sample in windows of a half, a quarter and so on, some beside decoding requests; then its layers from the top, one as a
    /// whole, others in halves, quarters and so on, alone, two in a step, or beside a request. What a few layers have told, the
    /// others need not tell again: they go by as a whole.
    /// </summary>
    private void ProfileSample(TrainingRun run, int round, Func<TimeSpan> timeLeft)
    {
        int length = run.Cursor.Sample.Ids.Length;
        int count = 0;
        while (run.Cursor.Phase == TrainingPhase.Forward)
        {
            int left = length - run.Cursor.PositionsDone;
            int tokens = Math.Min(steps.Limits.TokensPerStepMax - 4, left <= 4 ? left : (left + 1) / 2);
            Inference[] beside = count++ % 2 == round % 2 ? [] : Decodes(4, 64);
            beside = steps.Fits(beside) && beside.Length + tokens <= steps.Limits.TokensPerStepMax ? beside : [];
            if (tokens < 1 || TimeOf(tokens + beside.Length) > timeLeft())
            {
                return;
            }

            _measured.Add(steps.Measure(beside, run, tokens, []));
        }

        while (run.Cursor.Phase == TrainingPhase.Backward && timeLeft() > TimeSpan.Zero)
        {
            int left = run.Cursor.RowsLeft;
            int pattern = steps.Config.LayerCount - run.Cursor.Layer > LayersInParts ? 0 : (run.Cursor.Layer + round) % 4;
            int rows = Math.Min(steps.Limits.BackwardRowsMax, pattern == 0 || left <= 8 ? left : (left + 1) / 2);
            int[] items = pattern == 2 && left - rows > 1
                ? [rows, Math.Min(steps.Limits.BackwardRowsMax, (left - rows + 1) / 2)]
                : [rows];
            bool isLast = run.Cursor.Layer == run.Cursor.LowestLayer && items.Sum() == left;
            Inference[] beside = pattern == 3 && left == length ? Decodes(1, 64) : [];
            (StepFeatures, TimeSpan) step = steps.Measure(steps.Fits(beside) ? beside : [], run, 0, items);
            if (!isLast) // The optimizer's time is in that one.
            {
                _measured.Add(step);
            }
        }
    }

    /// <summary>Seconds that a batch may take, from the largest measured one of no more rows.</summary>
    private TimeSpan TimeOf(int rows)
    {
        (StepFeatures nearest, TimeSpan time) =
            _measured.Where(m => m.Features.BackwardItems == 0 && m.Features.BatchRows <= rows).DefaultIfEmpty()
                .MaxBy(m => m.Features.BatchRows);
        return nearest.BatchRows == 0 ? TimeSpan.Zero : time * rows / nearest.BatchRows;
    }

    // So long that a few rounds of it fit.
    private int SampleTokens(TimeSpan timeLeft)
    {
        int most = Math.Min(SampleTokensMax, steps.PositionsMax);
        if (timeLeft <= TimeSpan.Zero || _measured.Count == 0)
        {
            return 0;
        }

        double row = _measured.Min(m => m.Time.TotalSeconds / m.Features.BatchRows);
        double fitting = timeLeft.TotalSeconds / SamplesInTime / (row * CostOfTraining);
        return fitting >= most ? most : fitting < SampleTokensMin ? 0 : (int)fitting;
    }
}
