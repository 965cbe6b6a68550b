using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Graph;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Engine;

/// <summary>What an engine without requests and jobs lends to its profiler.</summary>
internal sealed record ProfiledEngine(
    LoadedModel Model, StepLimits Limits, MemoryPlan Memory, DeviceBudget Budget, KvPool Pool, ForwardPass Forward, BackwardPass Backward,
    TokenBatch Batch, TimeProvider Clock);

/// <summary>
/// Times steps of throw-away tokens and of a throw-away finetuning job, so that the first real steps are planned from this
/// machine's speed. All memory is given back; where the device has none to spare for a job, finetuning is left to be guessed.
/// </summary>
internal sealed class LatencyProfiler(ProfiledEngine engine)
{
    // As many as a median needs; small models reach it long before the time is up.
    private const int RoundsMax = 6;
    private const int RoundsSmall = 3;
    private const int SampleTokensMax = 512;
    private const int SampleTokensMin = 8;
    private const int SamplesInTime = 3;
    private const int LayersInParts = 8;

    // The part of the time that may go by before anything counts, and how near a turn must be to the one before it.
    private const double WarmUpShare = 0.3;
    private const double WarmRatio = 0.9;

    // A token forward and backward costs at most about this many rows of a batch.
    private const double CostOfTraining = 4.0;

    private readonly float[] _logits = new float[engine.Model.Config.VocabularySize];
    private readonly Sampler _sampler = new(engine.Model.Config.VocabularySize);
    private readonly SamplingParameters _greedy = SamplingOptions.Greedy.Resolve(new SamplingDefaults(), engineSeed: 0);
    private readonly TokenHistory _history = new(countsTokens: false);
    private readonly int[] _ids = new int[engine.Limits.TokensPerStepMax];
    private readonly List<(StepFeatures Features, TimeSpan Time)> _measured = [];

    private int _blocksTouched;

    private int PositionsMax =>
        Math.Min(engine.Pool.Blocks.BlocksTotal * DeviceKvCache.TokensPerBlock, engine.Model.PositionsMax);

    /// <summary>
    /// A model of this machine, from what can be measured in the given time; null where that is too little. A step that is under
    /// way when the time is up is finished.
    /// </summary>
    public LatencyModel? Profile(TimeSpan timeMax)
    {
        long begun = engine.Clock.GetTimestamp();
        _measured.Clear();

        WarmUp(() => TimeLeft() - (timeMax * (1.0 - WarmUpShare)));
        TrainingRun? run = null;
        try
        {
            for (int round = 0; round < RoundsMax && TimeLeft() > TimeSpan.Zero; round++)
            {
                // Of the first round, a half is finetuning's.
                ProfileInference(
                    round < RoundsSmall ? SmallGrid() : SmallGrid().Concat(LargeGrid()),
                    () => TimeLeft() - (round == 0 ? timeMax / 2 : TimeSpan.Zero));
                if (round == 0)
                {
                    run = TryStart(SampleTokens(TimeLeft()));
                }

                if (run is not null)
                {
                    ProfileSample(run, round, TimeLeft);
                }
            }
        }
        finally
        {
            End(run);
        }

        return _measured.Count > 2 ? LatencyModel.FromCalibration(_measured, ContextPerRow(engine.Model.Config)) : null;

        TimeSpan TimeLeft() => timeMax - engine.Clock.GetElapsedTime(begun);
    }

    // Products with keys and values over products with weights. The former are smaller and take about twice as long for their size.
    private static double ContextPerRow(ModelConfig config)
    {
        double query = config.AttentionHeads * config.HeadDim;
        double weights = (2.0 * config.HiddenSize * (query + (config.KeyValueHeads * config.HeadDim))) +
            (3.0 * config.HiddenSize * config.IntermediateSize);
        return 2.0 * (2.0 * query / weights);
    }

    /// <summary>Predicts and measures random mixed steps of requests beside one job.</summary>
    /// <param name="model">What predicts.</param>
    /// <param name="count">Steps.</param>
    /// <param name="seed">Of their sizes.</param>
    /// <param name="learns">Whether the model sees each step after predicting it, as an engine's does.</param>
    public LatencyErrorReport HeldOut(LatencyModel model, int count, ulong seed, bool learns)
    {
        var random = new SeededRandom(seed);
        var steps = new List<(TimeSpan Expected, TimeSpan Most, TimeSpan Took)>();
        TrainingRun? run = TryStart(Math.Min(SampleTokensMax, PositionsMax));
        try
        {
            while (steps.Count < count)
            {
                Inference[] inference = RandomInference(ref random);
                bool trains = run is not null && random.Next(10) < 7;
                if (!trains && inference.Length == 0)
                {
                    continue;
                }

                (int forward, int[] items) = trains ? RandomTraining(run!, inference.Sum(i => i.Rows), ref random) : (0, []);
                (StepFeatures features, TimeSpan took) = Measure(inference, run, forward, items);
                steps.Add((model.Expect(features), model.Predict(features), took));
                model = learns ? model.Observe(features, took) : model;
            }
        }
        finally
        {
            End(run);
        }

        return LatencyErrorReport.Of(steps);
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
    private void WarmUp(Func<TimeSpan> timeLeft)
    {
        TimeSpan before = TimeSpan.MaxValue;
        while (timeLeft() > TimeSpan.Zero)
        {
            long begun = engine.Clock.GetTimestamp();
            foreach (Inference[] step in new[] { Decodes(1, 0), Decodes(8, 9), [new(0, 7, true)] }.Where(Fits))
            {
                Measure(step, run: null, 0, []);
            }

            TrainTiny();
            TimeSpan took = engine.Clock.GetElapsedTime(begun);
            if (took > before * WarmRatio)
            {
                return;
            }

            before = took;
        }
    }

    private void TrainTiny()
    {
        TrainingRun? run = TryStart(SampleTokensMin);
        try
        {
            while (run is { Cursor.Phase: TrainingPhase.Forward })
            {
                int left = run.Cursor.Sample.Ids.Length - run.Cursor.PositionsDone;
                Measure([], run, Math.Min(Math.Min(SampleTokensMin / 2, left), engine.Limits.TokensPerStepMax), []);
            }

            while (run is { Cursor.Phase: TrainingPhase.Backward })
            {
                Measure([], run, 0, [Math.Min(run.Cursor.RowsLeft, Math.Min(SampleTokensMin / 2, engine.Limits.BackwardRowsMax))]);
            }
        }
        finally
        {
            End(run);
        }
    }

    private void ProfileInference(IEnumerable<Inference[]> grid, Func<TimeSpan> timeLeft)
    {
        foreach (Inference[] step in grid.Where(Fits))
        {
            if (TimeOf(step.Sum(i => i.Rows)) < timeLeft())
            {
                Touch(step);
                _measured.Add(Measure(step, run: null, 0, []));
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
            int tokens = Math.Min(engine.Limits.TokensPerStepMax - 4, left <= 4 ? left : (left + 1) / 2);
            Inference[] beside = count++ % 2 == round % 2 ? [] : Decodes(4, 64);
            beside = Fits(beside) && beside.Length + tokens <= engine.Limits.TokensPerStepMax ? beside : [];
            if (tokens < 1 || TimeOf(tokens + beside.Length) > timeLeft())
            {
                return;
            }

            _measured.Add(Measure(beside, run, tokens, []));
        }

        while (run.Cursor.Phase == TrainingPhase.Backward && timeLeft() > TimeSpan.Zero)
        {
            int left = run.Cursor.RowsLeft;
            int pattern = engine.Model.Config.LayerCount - run.Cursor.Layer > LayersInParts ? 0 : (run.Cursor.Layer + round) % 4;
            int rows = Math.Min(engine.Limits.BackwardRowsMax, pattern == 0 || left <= 8 ? left : (left + 1) / 2);
            int[] items = pattern == 2 && left - rows > 1
                ? [rows, Math.Min(engine.Limits.BackwardRowsMax, (left - rows + 1) / 2)]
                : [rows];
            bool isLast = run.Cursor.Layer == run.Cursor.LowestLayer && items.Sum() == left;
            Inference[] beside = pattern == 3 && left == length ? Decodes(1, 64) : [];
            (StepFeatures, TimeSpan) step = Measure(Fits(beside) ? beside : [], run, 0, items);
            if (!isLast) // The optimizer's time is in that one.
            {
                _measured.Add(step);
            }
        }
    }

    // A part of the cache that was never used costs page faults, once.
    private void Touch(Inference[] step)
    {
        int blocks = step.Sum(i => BlockTable.BlocksFor(i.Start + i.Rows));
        if (blocks > _blocksTouched)
        {
            _blocksTouched = blocks;
            Measure(step, run: null, 0, []);
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
        int most = Math.Min(SampleTokensMax, PositionsMax);
        if (timeLeft <= TimeSpan.Zero || _measured.Count == 0)
        {
            return 0;
        }

        double row = _measured.Min(m => m.Time.TotalSeconds / m.Features.BatchRows);
        double fitting = timeLeft.TotalSeconds / SamplesInTime / (row * CostOfTraining);
        return fitting >= most ? most : fitting < SampleTokensMin ? 0 : (int)fitting;
    }

    private (StepFeatures Features, TimeSpan Time) Measure(Inference[] inference, TrainingRun? run, int forward, int[] items)
    {
        StepFeatures features = default;
        BlockPool blocks = engine.Pool.Blocks;
        BlockTable[] tables = [.. inference.Select(_ => new BlockTable())];
        try
        {
            foreach ((Inference part, BlockTable table) in inference.Zip(tables))
            {
                Check.That(table.EnsureCapacity(part.Start + part.Rows, blocks));
                features = features.WithInference(part.Start, part.Rows, part.IsSampled ? 1 : 0);
            }

            long begun = engine.Clock.GetTimestamp();
            engine.Batch.Clear();
            foreach ((Inference part, BlockTable table) in inference.Zip(tables))
            {
                engine.Batch.AddInference(
                    _ids.AsSpan(0, part.Rows), part.Start, engine.Pool.Cache, table.Blocks, adapter: null, part.IsSampled ? 1 : 0);
            }

            if (forward > 0)
            {
                features = features.WithForward(run!.Cursor.PositionsDone, forward);
                run.AddForwardWindow(engine.Batch, forward);
            }

            RunBatch(features.SampledRows);
            if (forward > 0)
            {
                run!.CompleteForward(forward);
            }

            foreach (int rows in items)
            {
                features = features.WithBackward(run!.Cursor.RowsLeft - rows, rows);
                if (run.RunBackward(engine.Backward, rows))
                {
                    run.Step();
                }
            }

            return (features, engine.Clock.GetElapsedTime(begun));
        }
        finally
        {
            foreach (BlockTable table in tables)
            {
                table.Release(blocks);
            }
        }
    }

    private void RunBatch(int sampled)
    {
        if (engine.Batch.Rows == 0)
        {
            return;
        }

        TensorSlice logits = engine.Forward.Run(engine.Batch);
        for (int i = 0; i < sampled; i++)
        {
            engine.Model.Backend.Download(logits.Slice(i, 1), _logits);
            _sampler.Sample(_logits, _greedy, _history);
        }
    }

    /// <summary>A job of one sample that never ends, or null where the device has no room for it.</summary>
    private TrainingRun? TryStart(int tokens)
    {
        LoadedModel model = engine.Model;
        int widest = Math.Min(model.Config.HiddenSize, model.Config.KeyValueHeads * model.Config.HeadDim);
        var method = new LoraConfig { Rank = Math.Min(16, widest) };
        OptimizerOptions optimizer = new AdamWOptions();
        if (tokens < SampleTokensMin)
        {
            return null;
        }

        TrainingProgram program = model.CompileTraining(PeftAdapter.NetworksOf(method, model.Config));
        long scratch = engine.Memory.ScratchBytes(trains: true) - engine.Memory.ScratchBytes(trains: false);
        int fitting = Bisection.Largest(
            tokens, n => engine.Memory.OfJob(program, method, optimizer.Moments, n).Bytes + scratch <= engine.Budget.BytesFree);
        if (fitting < SampleTokensMin)
        {
            return null;
        }

        PeftAdapter? adapter = null;
        try
        {
            model.Backend.ReserveScratch(engine.Memory.Scratch(trains: true));
            engine.Backward.Reserve(program);
            adapter = PeftAdapter.CreateRandom(model.Backend, model.Config, method, seed: 1);
            int[] ids = new int[fitting];
            var plan = new TrainingPlan
            {
                Samples = [TrainingSample.FromTokens(ids, Enumerable.Repeat(true, fitting).ToArray())],
                Epochs = 1 << 20,
                Optimizer = optimizer,
            };
            return new TrainingRun(model, adapter, plan, program);
        }
        catch (Exception e)
        {
            adapter?.Dispose();
            Release(program);
            if (model.Backend.IsOutOfMemory(e)) // The machine has less than its budget says: a profile is not worth a refusal.
            {
                return null;
            }

            throw;
        }
    }

    private void End(TrainingRun? run)
    {
        if (run is not null)
        {
            run.Dispose();
            Release(run.Program);
        }
    }

    private void Release(TrainingProgram program)
    {
        engine.Backward.Release(program);
        engine.Model.Backend.ReserveScratch(engine.Memory.Scratch(trains: false));
    }

    private static Inference[] Decodes(int count, int context) => [.. Enumerable.Repeat(new Inference(context, 1, true), count)];

    private bool Fits(Inference[] step) =>
        step.Length <= engine.Limits.SequencesMax && step.Sum(i => i.Rows) <= engine.Limits.TokensPerStepMax &&
        step.All(i => i.Start + i.Rows <= PositionsMax) &&
        step.Sum(i => BlockTable.BlocksFor(i.Start + i.Rows)) <= engine.Pool.Blocks.BlocksFree;

    private Inference[] RandomInference(ref SeededRandom random)
    {
        while (true)
        {
            var step = new List<Inference>();
            for (int i = random.Next(17); i > 0; i--)
            {
                step.Add(new Inference(random.Next(Math.Min(PositionsMax, 1024)), 1, true));
            }

            if (random.Next(10) < 3)
            {
                int rows = random.Next(1, 1 + Math.Min(PositionsMax, 192));
                step.Add(new Inference(random.Next(1 + Math.Min(PositionsMax - rows, 512)), rows, random.Next(2) == 0));
            }

            if (Fits([.. step]))
            {
                return [.. step];
            }
        }
    }

    private (int Forward, int[] Items) RandomTraining(TrainingRun run, int rowsTaken, ref SeededRandom random)
    {
        if (run.Cursor.Phase == TrainingPhase.Forward)
        {
            int left = run.Cursor.Sample.Ids.Length - run.Cursor.PositionsDone;
            int most = Math.Min(Math.Min(left, 160), engine.Limits.TokensPerStepMax - rowsTaken);
            return (most == 0 ? 0 : random.Next(1, most + 1), []);
        }

        var items = new List<int>();
        int rowsLeft = run.Cursor.RowsLeft;
        for (int i = random.Next(1, 5); i > 0 && rowsLeft > 0; i--)
        {
            items.Add(random.Next(1, 1 + Math.Min(rowsLeft, engine.Limits.BackwardRowsMax)));
            rowsLeft -= items[^1];
        }

        return (0, [.. items]);
    }

    /// <summary>Rows of one sequence in a step.</summary>
    private readonly record struct Inference(int Start, int Rows, bool IsSampled);
}
