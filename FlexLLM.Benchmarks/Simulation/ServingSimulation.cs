using FlexLLM.Backends.Null;
using FlexLLM.Benchmarks.Serving;
using FlexLLM.Engine;
using FlexLLM.Finetuning;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Scheduling;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>What one engine of a simulation does.</summary>
internal sealed record SimulatedLoad
{
    /// <summary>What steps take.</summary>
    public required StepTimes Times { get; init; }

    /// <summary>Layers of the model.</summary>
    public required int Layers { get; init; }

    /// <summary>Tokens in the KV cache; it holds at least one sequence of the greatest length.</summary>
    public required int KvTokens { get; init; }

    /// <summary>Longest prompt and answer together, and longest sample.</summary>
    public int ContextTokens { get; init; } = SimulatedWorkload.TokensMax;

    /// <summary>TPOT target in seconds.</summary>
    public required double TpotTarget { get; init; }

    /// <summary>TTFT target in seconds.</summary>
    public double TtftTarget { get; init; } = 5.0;

    public SharingPolicy Policy { get; init; } = SharingPolicy.CoServing;

    /// <summary>Time in which tokens are counted, in seconds. What has arrived is served beyond it.</summary>
    public required double Seconds { get; init; }

    /// <summary>Requests; empty for a machine that finetunes alone.</summary>
    public IReadOnlyList<TraceArrival> Arrivals { get; init; } = [];

    /// <summary>Lengths of the job's samples; empty for a machine without a job.</summary>
    public IReadOnlyList<int> Samples { get; init; } = [];

    /// <summary>Plans with exact times, not with what it learns: a bound for what any latency model could do.</summary>
    public bool KnowsTimes { get; init; }

    /// <summary>See <see cref="StepLimits.KeepsReserve"/>.</summary>
    public bool KeepsReserve { get; init; } = true;

    /// <summary>Most rows of a batch.</summary>
    public int TokensPerStepMax { get; init; } = 256;

    /// <summary>Most sequences that run at a time; at most <see cref="TokensPerStepMax"/>.</summary>
    public int SequencesMax { get; init; } = 256;

    /// <summary>Longest finetuning while no request is there.</summary>
    public TimeSpan IdleStepMax { get; init; } = TimeSpan.FromMilliseconds(100);

    /// <summary>Deviation of the logarithm of a step's time from what the machine's rates say.</summary>
    public double Jitter { get; init; } = 0.02;

    /// <summary>Requests inside the engine at a time, running or waiting; callers beyond wait outside, in their order.</summary>
    public int PlacesMax { get; init; } = 512;

    /// <summary>Samples to an optimizer step.</summary>
    public int Accumulation { get; init; } = 8;

    /// <summary>Where its <see cref="EventLog"/> is kept; null for nowhere.</summary>
    public string? LogFile { get; init; }
}

/// <summary>
/// The engine's own loop on a machine that exists only as a clock. Callers come at their times through the inbox; the backend's
/// work alone moves the clock, and the next arrival where there is none. Everything follows from load and seed.
/// </summary>
internal sealed class ServingSimulation : IDisposable
{
    private const double BinSeconds = 10;

    // What an engine that has just measured its machine allows for a step that takes longer than most.
    private const double TailAtStart = 1.1;

    // A machine that falls behind for ever is not simulated for ever.
    private const double DrainSecondsMax = 600;

    private readonly SimulatedLoad _load;
    private readonly ManualClock _clock = new();
    private readonly EngineInbox _inbox = new(capacity: 4096);
    private readonly LoopCaller _callers;
    private readonly LoadedModel _model;
    private readonly EngineLoop _loop;
    private readonly SimulatedBackend _backend;
    private readonly LatencyModel _exact;
    private readonly TimeSpan _start;
    private readonly List<(TraceArrival Arrival, Task<InferenceSequence> Submitted)> _requests = [];
    private readonly List<InferenceSequence> _active = [];
    private readonly List<double> _errors = [];
    private readonly EventLog _log;
    private readonly ThroughputPoint[] _series;
    private double _busy;
    private long _generatedCounted;
    private long _trainedCounted;
    private int _next;
    private int _inside; // Requests submitted, and not at their ends.

    public ServingSimulation(SimulatedLoad load, ulong seed)
    {
        _load = load;
        _log = new EventLog(load.LogFile);
        _callers = new LoopCaller(_inbox, _clock);
        _series = new ThroughputPoint[(int)Math.Ceiling(load.Seconds / BinSeconds)];
        _exact = load.Times.Calibrated;
        ModelConfig config = StandIn(load.Layers) with { MaxPositions = load.ContextTokens };
        NullMachine jitter = new() { FlopsPerSecond = 1, BytesPerSecond = 1, Jitter = load.Jitter };
        _backend = new SimulatedBackend(load.Times, config.LayerCount, jitter, _clock, seed);
        _model = LoadedModel.CreateEmpty(config, _backend, DType.BF16, config.MaxPositions);
        var options = new CoServingOptions
        {
            Clock = _clock,
            Sharing = load.Policy,
            Slo = new ServiceLevelObjective
            {
                TimePerOutputToken = TimeSpan.FromSeconds(load.TpotTarget),
                TimeToFirstToken = TimeSpan.FromSeconds(load.TtftTarget),
            },
            TokensPerStepMax = load.TokensPerStepMax,
            SequencesMax = Math.Min(load.SequencesMax, load.TokensPerStepMax),
            IdleStepMax = load.IdleStepMax,
            PrefixCaching = false, // Prompts stand for unrelated ones, but here all are zeros.
            InboxCapacity = 4096,
            Seed = seed,
            DeviceBytesMax = 1L << 40, // The stand-in's bytes say nothing about the model's.
        };
        options.Validate();
        int blocks = BlockTable.BlocksFor(Math.Max(load.KvTokens, config.MaxPositions));
        _loop = new EngineLoop(_model, tokenizer: null, options, _inbox, eosTokens: [], blocks)
        {
            Latency = _exact with { Tail = Math.Max(_exact.Tail, TailAtStart) },
        };

        // Others hold back against what they cannot foresee.
        _loop.Limits = load.KnowsTimes
            ? _loop.Limits with { PromptHeldBack = 0.0, TpotPlanned = 1.0, ChunksAhead = 0, KeepsReserve = false }
            : _loop.Limits with { KeepsReserve = load.KeepsReserve };

        if (load.Samples.Count > 0)
        {
            _ = _callers.Call(StartJob(load.Samples));
        }

        _backend.Plan = () => _loop.LastPlan;
        _start = _loop.Now;
        _backend.Waits = SubmitArrived;
    }

    /// <summary>Time in seconds since the start.</summary>
    public double Now => (_loop.Now - _start).TotalSeconds;

    /// <summary>Measured over expected time of the steps so far, less 1.</summary>
    public IReadOnlyList<double> PredictionErrors => _errors;

    /// <summary>
    /// What stands for a model where nothing is computed: its layers, because backward items are layers; of all else the least that a
    /// decoder can have.
    /// </summary>
    public static ModelConfig StandIn(int layers) => new()
    {
        Architecture = ModelArchitecture.Llama,
        HiddenSize = 32,
        IntermediateSize = 32,
        LayerCount = layers,
        AttentionHeads = 1,
        KeyValueHeads = 1,
        HeadDim = 32,
        VocabularySize = 64,
        MaxPositions = SimulatedWorkload.TokensMax,
    };

    /// <summary>Runs to the end of the load and serves what is left.</summary>
    public ServingRun Run(string mode, string loadName)
    {
        while (Now < _load.Seconds + DrainSecondsMax)
        {
            SubmitArrived();
            bool isOver = Now >= _load.Seconds && _next == _load.Arrivals.Count && _inside == 0;
            if (isOver)
            {
                break;
            }

            Step();
        }

        return Outcome(mode, loadName);
    }

    public void Dispose()
    {
        _inbox.Close(new ObjectDisposedException(nameof(ServingSimulation)));
        _loop.Stop(new ObjectDisposedException(nameof(ServingSimulation)), jobs: null);
        _loop.Dispose();
        _model.Dispose();
        _backend.Dispose();
        _log.Dispose();
    }

    private void Step()
    {
        double begun = Now;
        if (_load.KnowsTimes)
        {
            _loop.Latency = _exact;
        }

        LatencyModel believed = _loop.Latency;
        if (_loop.RunStep())
        {
            Record(begun, believed);
        }
        else
        {
            double next = _next < _load.Arrivals.Count ? _load.Arrivals[_next].Time : Math.Max(_load.Seconds, begun);
            _clock.Advance(TimeSpan.FromSeconds(Math.Max(next - Now, 1e-6)));
        }
    }

    private void SubmitArrived()
    {
        while (_inside < _load.PlacesMax && _next < _load.Arrivals.Count && _load.Arrivals[_next].Time <= Now)
        {
            Submit(_load.Arrivals[_next++]);
        }
    }

    private void Submit(TraceArrival arrival)
    {
        TimeSpan waited = TimeSpan.FromSeconds(Math.Max(0, Now - arrival.Time));
        _requests.Add((arrival, _callers.Submit(new int[arrival.PromptTokens], arrival.AnswerTokens, waited, _active.Add)));
        _inside++;
    }

    private Func<EngineLoop, FinetuningJob> StartJob(IReadOnlyList<int> lengths)
    {
        TrainingSample[] samples =
            [.. lengths.Select(n => TrainingSample.FromTokens(new int[n], Enumerable.Repeat(true, n).ToArray()))];
        var request = new FinetuningRequest
        {
            Adapter = "job",
            Dataset = TrainingDataset.FromExamples([]),
            Method = new LoraConfig { Rank = 16, TargetModules = ["down_proj"] },
            Optimizer = new SgdOptions { LearningRate = 1e-3f },
            GradientAccumulation = _load.Accumulation,
            Epochs = 10_000,
        };
        return loop => loop.Jobs.Start(_inbox, request, new BuiltSamples(samples, 0, 0, 0), loop.Now);
    }

    private void Record(double begun, LatencyModel believed)
    {
        double took = Now - begun;
        _busy += Math.Clamp(_load.Seconds - begun, 0, took);
        if (_loop.LastPlan is not StepPlan plan)
        {
            _log.Write("given-up"u8, TicksOf(begun), TicksOf(took));
            return;
        }

        _errors.Add((took / Math.Max(believed.Expect(plan.Features).TotalSeconds, 1e-9)) - 1);
        Count(plan);
        Log(plan, TicksOf(begun), TicksOf(took));
        _inside -= _active.RemoveAll(s => s.Stream.Completion.IsCompleted);
    }

    private void Count(StepPlan plan)
    {
        long generated = _loop.Counters.GeneratedTokens - _generatedCounted;
        long trained = _loop.Jobs.TokensTrained - _trainedCounted;
        (_generatedCounted, _trainedCounted) = (_loop.Counters.GeneratedTokens, _loop.Jobs.TokensTrained);
        int bin = (int)(Now / BinSeconds);
        if (bin < _series.Length)
        {
            ThroughputPoint point = _series[bin];
            int prompts = plan.Inference.Where(w => w.Tokens > 1).Sum(w => w.Tokens);
            _series[bin] = new ThroughputPoint(
                bin * BinSeconds, point.PromptTokens + prompts, point.GeneratedTokens + generated, point.TrainedTokens + trained);
        }
    }

    private void Log(StepPlan plan, long begun, long took)
    {
        foreach (SequenceId id in plan.Preemptions)
        {
            _log.Write("preempt"u8, id.Value);
        }

        foreach (SequenceId id in plan.Admissions)
        {
            _log.Write("admit"u8, id.Value);
        }

        StepFeatures f = plan.Features;
        _log.Write("step"u8, begun, took, f.InferenceRows, f.InferenceContext, f.ForwardRows, f.BackwardRows);
        foreach (InferenceSequence sequence in _active)
        {
            while (sequence.Stream.TryRead(out GeneratedToken? token))
            {
                _log.Write("token"u8, sequence.Id.Value, token.TokenId);
            }
        }
    }

    private static long TicksOf(double seconds) => (long)Math.Round(seconds * TimeSpan.TicksPerSecond);

    private ServingRun Outcome(string mode, string loadName) => new()
    {
        Mode = mode,
        Load = loadName,
        RequestsPerSecond = _load.Arrivals.Count / _load.Seconds,
        Seconds = _load.Seconds,
        TtftTarget = _load.TtftTarget,
        TpotTarget = _load.TpotTarget,
        Requests =
        [
            .. _requests.Select(r => OutcomeOf(r.Arrival, r.Submitted)),

            // Who never found a place was not served.
            .. _load.Arrivals.Skip(_next).Select(a => new RequestOutcome(a.Time, a.PromptTokens, a.AnswerTokens, null, null, 0)),
        ],
        TokensGenerated = _series.Sum(p => p.GeneratedTokens),
        TokensTrained = _series.Sum(p => p.TrainedTokens),
        Steps = _loop.Counters.Steps,
        FinetuningSteps = _loop.Counters.FinetuningSteps,
        StepsOverBudget = _loop.Counters.StepsOverBudget,
        Preemptions = _loop.Counters.Preemptions,
        BusySeconds = _busy,
        Series = _series,
        EventHash = _log.Digest,
    };

    private RequestOutcome OutcomeOf(TraceArrival arrival, Task<InferenceSequence> submitted)
    {
        InferenceSequence? s = submitted.IsCompletedSuccessfully ? submitted.Result : null;
        return new RequestOutcome(
            arrival.Time, arrival.PromptTokens, arrival.AnswerTokens, (s?.FirstTokenTime - _start)?.TotalSeconds,
            (s?.LastTokenTime - _start)?.TotalSeconds, s?.Generated ?? 0);
    }
}
