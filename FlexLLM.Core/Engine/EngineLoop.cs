using System.Collections.Immutable;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;
using FlexLLM.Tokenization;

namespace FlexLLM.Engine;

/// <summary>
/// One step after another: take what callers want, take a snapshot, plan, run one batch of inference and finetuning rows, commit,
/// run backward items, learn the step's latency. Owns all mutable state of an engine; one thread at a time, whichever it is
/// (the engine's own, or a simulation's).
/// </summary>
internal sealed partial class EngineLoop : IDisposable
{
    private readonly LoadedModel _model;
    private readonly Tokenizer? _tokenizer;
    private readonly CoServingOptions _options;
    private readonly EngineInbox _inbox;
    private readonly TimeProvider _clock;
    private readonly long _start;
    private readonly MemoryPlan _memory;
    private readonly KvPool _pool;
    private readonly BlockPool _blocks;
    private readonly ForwardPass _forward;
    private readonly BackwardPass _backward;
    private readonly TokenBatch _batch;
    private readonly TokenChooser _chooser;
    private readonly HashSet<int> _eos;
    private readonly ResourceSet _owned = new();

    // In order of arrival; a preempted sequence keeps its place.
    private readonly SortedDictionary<long, InferenceSequence> _sequences = [];
    private readonly TenantTable _tenants;
    private readonly GuardedLogger _logger;
    private readonly PlannerScratch _scratch = new();
    private long _nextId = 1;
    private int _stepsSinceFinetuning;
    private bool _owesWindow; // One was given up, and none was done since.

    public EngineLoop(
        LoadedModel model, Tokenizer? tokenizer, CoServingOptions options, EngineInbox inbox, IEnumerable<int> eosTokens, int kvBlocks)
    {
        _model = model;
        _tokenizer = tokenizer;
        _options = options;
        _inbox = inbox;
        _clock = options.Clock;
        _start = _clock.GetTimestamp();
        Limits = new StepLimits
        {
            Sharing = options.Sharing,
            TokensPerStepMax = options.TokensPerStepMax,
            SequencesMax = options.SequencesMax,
            BackwardRowsMax = options.TokensPerStepMax,
            IdleStepMax = options.IdleStepLimit,
            GivesUpWindows = options.Sharing.Mode == SharingMode.CoServing,
        };
        Limits.Validate();
        ModelConfig config = model.Config;
        _memory = EngineMemory.PlanOf(model.Whole, model.Program, model.Backend, options, model.PositionsMax, model.Shard);
        try
        {
            _pool = _owned.Add(new KvPool(model.Backend, config, kvBlocks, options.PrefixCaching));
            _forward = _owned.Add(new ForwardPass(model, options.TokensPerStepMax, options.SequencesMax));
            model.Backend.ReserveScratch(_memory.Scratch(trains: false));
        }
        catch
        {
            _owned.Dispose();
            throw;
        }

        _backward = _owned.Add(new BackwardPass(model, options.TokensPerStepMax));
        _blocks = _pool.Blocks;
        _batch = new TokenBatch(options.TokensPerStepMax);
        _chooser = new TokenChooser(model.Backend, config.VocabularySize, options.SequencesMax);
        _eos = [.. eosTokens];
        _tenants = new TenantTable(options.TenantWeights);
        _logger = new GuardedLogger(options.Logger);
        Adapters = new AdapterStore(options.AdaptersMax);
        int blocksMin = Math.Min(kvBlocks, EngineMemory.KvBlocksMin(options, model.PositionsMax));
        Budget = new DeviceBudget(
            model.Backend, _pool, options.DeviceBytesLimit(model.Backend), blocksMin, BlocksPromised, Vacate, () => Jobs!.StopAhead());
        Jobs = new JobTable(model, Adapters, _backward, _memory, Budget, options, _logger);
    }

    public LoadedModel Model => _model;

    public AdapterStore Adapters { get; }

    public JobTable Jobs { get; }

    /// <summary>Who holds which part of the device.</summary>
    public DeviceBudget Budget { get; }

    /// <summary>What plans believe about this machine; learns from every step.</summary>
    public LatencyModel Latency { get; set; } = LatencyModel.Default;

    /// <summary>Bounds of its steps.</summary>
    public StepLimits Limits { get; set; }

    /// <summary>Counters that statistics read.</summary>
    public EngineCounters Counters { get; } = new();

    /// <summary>What the last step was to do, null where it was given up; tests and simulations look at it.</summary>
    public StepPlan? LastPlan { get; private set; }

    /// <summary>How many of that plan's backward items were done: the first ones, unless the step was late or somebody called.</summary>
    public int LastItems { get; private set; }

    /// <summary>Time since the loop was made.</summary>
    public TimeSpan Now => _clock.GetElapsedTime(_start);

    public int KvTokensMax => _blocks.BlocksTotal * DeviceKvCache.TokensPerBlock;

    public int BlocksHeld => _blocks.BlocksHeld;

    public int BlocksTotal => _blocks.BlocksTotal;

    public int BlocksMax => _pool.BlocksMax;

    public int SequenceCount => _sequences.Count;

    public int RunningCount => _sequences.Values.Count(s => s.Phase == SequencePhase.Running);

    /// <summary>Does one step. False when there was nothing to do: wait for the inbox.</summary>
    public bool RunStep()
    {
        // At most an inbox full a step: callers that never stop calling must not stop the answers.
        for (int i = 0; i < _options.InboxCapacity && _inbox.TryTake(out Submission? submission); i++)
        {
            submission.Execute(this);
        }

        DropCancelled();
        Budget.GiveBack();
        if (_sequences.Count == 0 && (!Jobs.HasWork || Limits.Sharing.Mode == SharingMode.InferenceOnly))
        {
            return _inbox.HasItems;
        }

        EngineSnapshot before = TakeSnapshot();

        // Callers that never stop must not stop the job: no two windows running are given up.
        StepLimits limits = _owesWindow ? Limits with { GivesUpWindows = false } : Limits;
        StepPlan plan = HybridTokenScheduler.Plan(before, limits, Latency, _scratch);
        (LastPlan, LastItems) = (plan, 0);
        Check.That(!plan.IsEmpty, "a step with work plans some of it");
        long begun = _clock.GetTimestamp();
        Apply(plan);
        try
        {
            if (!TryRunBatch(plan, begun, mayGiveUp: before.Sequences.IsEmpty && limits.GivesUpWindows))
            {
                (LastPlan, _owesWindow) = (null, true);
                Counters.StepsGivenUp++;
                Counters.TimeInSteps += TimeSince(begun);
                return true;
            }
        }
        catch (Exception e) when (_model.Backend.IsOutOfMemory(e))
        {
            Relieve(plan, e);
            return true;
        }

        StepFeatures done = plan.Features.WithoutBackward();
        TimeSpan elapsed = TimeSince(begun);
        foreach (BackwardWindow window in plan.Backward)
        {
            // A job can stop after any item: a step that takes longer than planned leaves to a later one what may end too late. So does an
            // idle one, also when somebody calls, but never before its first item: callers that never stop must not stop the job.
            StepFeatures after = done.WithBackward(window.RowStart, window.RowCount);
            bool isLate = elapsed + (Latency.Predict(after) - Latency.Predict(done)) > plan.Budget;
            bool isCalled = Preempts && _inbox.HasItems;
            if (_sequences.Count > 0 ? isLate : done.BackwardItems > 0 && (isLate || isCalled))
            {
                break;
            }

            Jobs.RunBackward(window, Now);
            done = after;
            elapsed = TimeSince(begun);
        }

        LastItems = done.BackwardItems;
        _owesWindow &= plan.Forward.IsEmpty;
        ObserveSlack(before, done, elapsed);
        Latency = Latency.Observe(done, elapsed);
        Counters.Steps++;
        Counters.TimeInSteps += elapsed;
        _stepsSinceFinetuning = plan.HasFinetuning ? 0 : _stepsSinceFinetuning + 1;
        Counters.FinetuningSteps += plan.HasFinetuning ? 1 : 0;
        Counters.StepsOverBudget += plan.HasFinetuning && elapsed > plan.Budget ? 1 : 0;
        return true;
    }

    /// <summary>All that the next plan depends on.</summary>
    public EngineSnapshot TakeSnapshot()
    {
        var sequences = ImmutableArray.CreateBuilder<SequenceSnapshot>(_sequences.Count);
        foreach (InferenceSequence sequence in _sequences.Values)
        {
            sequences.Add(sequence.Snapshot(_pool));
        }

        return new EngineSnapshot
        {
            Now = Now,
            Sequences = sequences.MoveToImmutable(),
            Jobs = Jobs.Snapshot(),
            StepsSinceFinetuning = _stepsSinceFinetuning,
            Reserve = _reserve,
            Tenants = _tenants.Snapshot(),
            FreeBlocks = _blocks.BlocksFree,
            TotalBlocks = _blocks.BlocksTotal,
            TokensPerBlock = DeviceKvCache.TokensPerBlock,
        };
    }

    /// <summary>
    /// Measures throw-away steps for about the given time, or a time that fits the model, so that the first real ones are planned
    /// from this machine's speed.
    /// </summary>
    public void Calibrate(TimeSpan? timeMax) => Latency = new LatencyProfiler(Timer()).Profile(timeMax) ?? Latency;

    /// <summary>What times steps on this engine, while it has neither requests nor jobs.</summary>
    public StepTimer Timer()
    {
        Check.That(_sequences.Count == 0 && Jobs.Bytes == 0);
        return new StepTimer(
            new ProfiledEngine(_model, Limits, _memory, Budget, _pool, _forward, _backward, _batch, _clock));
    }

    /// <summary>
    /// Takes a request in, or refuses it. Adapter names are resolved here, everything else was checked by the caller.
    /// </summary>
    public InferenceSequence Submit(GenerationRequest request, PreparedRequest prepared)
    {
        int[] prompt = prepared.Prompt;
        int tokensMax = (int)Math.Min((long)prompt.Length + request.MaxTokens, Math.Min(_model.PositionsMax, KvTokensMax));
        if (prompt.Length >= tokensMax)
        {
            throw new RequestRejectedException(
                $"The prompt has {prompt.Length} tokens; with room for an answer at most {tokensMax - 1} fit " +
                $"(context {_model.PositionsMax}, KV cache {KvTokensMax} tokens).");
        }

        AdapterVersion? adapter = request.Adapter is null ? null : Adapters.Get(request.Adapter);
        CheckTargets(request, prompt, adapter);

        // Without a seed of its own each request draws from another stream.
        var id = new SequenceId(_nextId++);
        ulong seed = request.Sampling.Seed ?? _options.Seed + (0x9E3779B97F4A7C15 * (ulong)id.Value);
        var history = new TokenHistory(prepared.Sampling.CountsTokens);
        history.AddPrompt(prompt);
        var sequence = new InferenceSequence
        {
            Id = id,
            Tokens = [.. prompt],
            PromptLength = prompt.Length,
            TokensMax = tokensMax,
            Sampling = prepared.Sampling with { Seed = seed },
            History = history,
            Stops = new StopMatcher(prepared.Stops),
            Decoder = _tokenizer is null ? null : new StreamingDecoder(_tokenizer, skipSpecialTokens: true),
            OnEnded = prepared.OnEnded,
            IgnoreEos = request.IgnoreEos,
            Priority = request.PriorityLevel,
            Slo = (request.Slo ?? _options.SloOf(request.Class)).Bounded(),
            ArrivalTime = _clock.GetElapsedTime(_start, prepared.Arrived),
            Adapter = adapter?.Acquire(),
            Prefix = new PrefixPath(adapter),
            Tenant = _tenants.Enter(request.Tenant),
        };
        _sequences.Add(id.Value, sequence);
        Counters.Requests++;
        return sequence;
    }

    /// <summary>
    /// Ends everything: every waiter gets the cause first, then what they held is given back, which may fail after a fault. Device
    /// memory is freed by <see cref="Dispose"/>.
    /// </summary>
    public void Stop(Exception streams, Exception? jobs)
    {
        foreach (InferenceSequence sequence in _sequences.Values)
        {
            sequence.CloseStream(streams);
            sequence.End();
        }

        Jobs.EndAll(jobs);
        foreach (InferenceSequence sequence in _sequences.Values.ToArray())
        {
            Remove(sequence);
        }

        Check.That(_blocks.BlocksHeld == 0);
    }

    public void Dispose()
    {
        Jobs.Dispose();
        Adapters.Dispose();
        _owned.Dispose();
    }

    // What the device has still to do belongs to the step.
    private TimeSpan TimeSince(long begun)
    {
        _model.Backend.Synchronize();
        return _clock.GetElapsedTime(begun);
    }

    // The baselines do not: they are compared with as they are described.
    private bool Preempts => Limits.Sharing.Mode == SharingMode.CoServing;

    private void DropCancelled()
    {
        foreach (InferenceSequence sequence in _sequences.Values.Where(s => s.CancelRequested).ToArray())
        {
            Remove(sequence);
            sequence.CloseStream();
        }
    }

    private void Apply(StepPlan plan)
    {
        foreach (SequenceId id in plan.Preemptions)
        {
            Preempt(_sequences[id.Value]);
        }

        foreach (SequenceId id in plan.Admissions)
        {
            InferenceSequence sequence = _sequences[id.Value];
            sequence.Admit(_pool);
            Counters.TokensReused += sequence.Computed;
            _tenants.Admit(sequence.Tenant, sequence.ServiceDue, Now);
            sequence.PromptCharged = true;
        }
    }

    // When it is admitted next, it computes those keys and values again that are gone by then.
    private void Preempt(InferenceSequence sequence)
    {
        if (sequence.Phase == SequencePhase.Running)
        {
            _tenants.Wait(sequence.Tenant);
        }

        sequence.Preempt(_pool);
        Counters.Preemptions++;
    }
}
