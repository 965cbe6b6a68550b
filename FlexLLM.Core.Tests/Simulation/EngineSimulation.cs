using System.Security.Cryptography;
using System.Text;
using FlexLLM.Backends;
using FlexLLM.Backends.Null;
using FlexLLM.Benchmarks.Simulation;
using FlexLLM.Engine;
using FlexLLM.Finetuning;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;
using FlexLLM.Tests.Support;

namespace FlexLLM.Tests.Simulation;

/// <summary>A step as it was planned, and as it went.</summary>
internal sealed record StepRecord(TimeSpan Begun, TimeSpan Took, StepPlan Plan, int Items)
{
    /// <summary>The backward items that were done.</summary>
    public ReadOnlySpan<BackwardWindow> Backward => Plan.Backward.AsSpan(0, Items);
}

/// <summary>One simulated request and what became of it.</summary>
internal sealed record SimulatedRequest(Arrival Arrival, Task<InferenceSequence> Submitted)
{
    public InferenceSequence Sequence => Submitted.Result;

    /// <summary>When each of its tokens was delivered.</summary>
    public List<TimeSpan> TokenTimes { get; } = [];

    public bool IsDone => Submitted.IsCompletedSuccessfully && Sequence.Stream.Completion.IsCompleted;

    /// <summary>From arrival, not from the moment when the loop took the request in.</summary>
    public bool MetTtft => Sequence.FirstTokenTime!.Value - Arrival.Time <= Sequence.Slo.TimeToFirstToken;

    public bool MetTpot => Sequence.Generated < 2 ||
        (Sequence.LastTokenTime - Sequence.FirstTokenTime)!.Value / (Sequence.Generated - 1) <= Sequence.Slo.TimePerOutputToken;
}

/// <summary>
/// The engine's own loop on a machine that exists only as a clock. Callers come at drawn times through the inbox; the clock
/// is moved by the backend's work alone, and to the next arrival where there is none. Everything follows from the seed.
/// </summary>
internal sealed class EngineSimulation : IDisposable
{
    public const int TokensPerStepMax = 512;

    private const int StepsMax = 100_000;

    private readonly ManualClock _clock = new();
    private readonly EngineInbox _inbox = new(capacity: 4096);
    private readonly LoadedModel _model;
    private readonly Queue<Arrival> _arriving;
    private readonly List<SimulatedRequest> _requests = [];
    private readonly List<SimulatedRequest> _active = [];
    private readonly List<StepRecord> _steps = [];
    private readonly Scenario _scenario;
    private readonly List<Task<FinetuningJob>> _jobs = [];
    private SeededRandom _random;
    private int _finetuningSteps;

    public EngineSimulation(Scenario scenario, ulong seed)
    {
        _scenario = scenario;
        Callers = new LoopCaller(_inbox, _clock);
        _random = new SeededRandom(~seed);
        _arriving = new Queue<Arrival>(scenario.Workload.Draw(seed));
        Backend = new NullBackend(scenario.Machine, _clock, seed);
        IComputeBackend device = scenario.Probe is null ? Backend : new ProbedBackend(Backend, scenario.Probe);
        _model = LoadedModel.CreateEmpty(Scenario.Model, device, DType.BF16, Scenario.Model.MaxPositions);
        var options = new CoServingOptions
        {
            Clock = _clock,
            Slo = scenario.Slo,
            Sharing = scenario.Sharing,
            TokensPerStepMax = TokensPerStepMax,
            SequencesMax = 64,
            Seed = seed,
            DeviceBytesMax = scenario.DeviceBytesMax,
            PrefixCaching = scenario.PrefixCaching,
            UnattainableSlo = scenario.Unattainable,
            Logger = scenario.Logger,
        };
        options.Validate();
        Loop = new EngineLoop(_model, tokenizer: null, options, _inbox, eosTokens: [], BlockTable.BlocksFor(scenario.KvTokens));
        Loop.Calibrate(options.ProfilingTimeMax);
        Start = Loop.Now;
        for (int i = 0; i < scenario.Jobs; i++)
        {
            Join();
        }
    }

    public NullBackend Backend { get; }

    public EngineLoop Loop { get; }

    /// <summary>For calls besides the workload's; requests go through <see cref="Send"/>.</summary>
    public LoopCaller Callers { get; }

    /// <summary>Arrivals count from here.</summary>
    public TimeSpan Start { get; }

    public TimeSpan Now => Loop.Now - Start;

    public IReadOnlyList<Task<FinetuningJob>> Jobs => _jobs;

    public IReadOnlyList<SimulatedRequest> Requests => _requests;

    public IReadOnlyList<StepRecord> Steps => _steps;

    public bool HasRequests => _arriving.Count + _active.Count > 0;

    public double TokensTrainedPerSecond => Loop.Jobs.TokensTrained / Now.TotalSeconds;

    /// <summary>Sends a request with targets of its own, now.</summary>
    public SimulatedRequest Ask(int promptTokens, int answerTokens, ServiceLevelObjective slo) =>
        Submit(new Arrival(Now, promptTokens, answerTokens), slo);

    /// <summary>Share of the requests that were answered within a target.</summary>
    public double Attained(Func<SimulatedRequest, bool> target) =>
        Requests.Count(r => r.IsDone && target(r)) / (double)Requests.Count;

    /// <summary>Share of the steps with finetuning that took more than their budget and a share of it.</summary>
    public static double OverBudget(IEnumerable<StepRecord> steps, double errorBound = 0.0)
    {
        StepRecord[] trained = [.. steps.Where(s => s.Plan.HasFinetuning)];
        return trained.Count(s => s.Took > s.Plan.Budget * (1.0 + errorBound)) / (double)trained.Length;
    }

    /// <summary>Steps until the condition holds, or all work is done.</summary>
    public EngineSimulation Run(Func<EngineSimulation, bool>? until = null)
    {
        while (until is null || !until(this))
        {
            while (_arriving.TryPeek(out Arrival next) && next.Time <= Now)
            {
                Submit(_arriving.Dequeue());
            }

            TimeSpan begun = Now;
            if (Loop.RunStep())
            {
                Record(begun);
            }
            else if (_arriving.TryPeek(out Arrival next))
            {
                _clock.Advance(next.Time - Now);
            }
            else
            {
                break;
            }
        }

        return this;
    }

    /// <summary>Sends a request besides the workload's, now unless an arrival is given.</summary>
    public SimulatedRequest Send(int[] prompt, int answerTokens, TimeSpan? arrived = null, ServiceLevelObjective? slo = null)
    {
        Task<InferenceSequence> submitted = Callers.Submit(prompt, answerTokens, waited: TimeSpan.Zero, slo: slo);
        TimeSpan time = (arrived ?? Now) + Start;
        _requests.Add(new SimulatedRequest(new Arrival(time, prompt.Length, answerTokens), submitted));
        _active.Add(_requests[^1]);
        return _requests[^1];
    }

    /// <summary>The machine stands still for so long.</summary>
    public void Stall(TimeSpan time) => _clock.Advance(time);

    /// <summary>One more job, from the next step on.</summary>
    public void Join() => _jobs.Add(Callers.Call(StartJob(_jobs.Count)));

    public EngineSimulation RunRequests() => Run(s => !s.HasRequests);

    /// <summary>A digest of all plans, times and tokens so far.</summary>
    public string LogHash()
    {
        var log = new StringBuilder();
        log.AppendJoin('\n', _steps.Select(s => $"{s.Begun.Ticks} {s.Took.Ticks} {s.Plan}"));
        log.AppendJoin('\n', _requests.Select(r => string.Join(' ', r.Sequence.Tokens)));
        return Convert.ToHexString(SHA256.HashData(Encoding.UTF8.GetBytes(log.ToString())));
    }

    /// <summary>Every block that the pool has handed out is some live request's.</summary>
    public static void CheckBlocks(EngineLoop loop, IEnumerable<SimulatedRequest> requests)
    {
        int held = requests.Where(r => r.Submitted.IsCompletedSuccessfully)
            .SelectMany(r => r.Sequence.Blocks.Blocks[..r.Sequence.Blocks.Count]).Distinct().Count();
        Check.That(held == loop.BlocksHeld && held <= loop.BlocksTotal, "blocks lost or invented");
    }

    public void Dispose()
    {
        _inbox.Close(new ObjectDisposedException(nameof(EngineSimulation)));
        Loop.Stop(new ObjectDisposedException(nameof(EngineSimulation)), jobs: null);
        Loop.Dispose();
        _model.Dispose();
        Backend.Dispose();
    }

    private SimulatedRequest Submit(Arrival arrival, ServiceLevelObjective? slo = null)
    {
        int[] prompt = new int[arrival.PromptTokens];
        foreach (ref int id in prompt.AsSpan())
        {
            id = _random.Next(Scenario.Model.VocabularySize);
        }

        var text = new SeededRandom((ulong)_random.Next(_scenario.Workload.Beginnings));
        foreach (ref int id in prompt.AsSpan(0, Math.Min(prompt.Length, _scenario.Workload.BeginningTokens)))
        {
            id = text.Next(Scenario.Model.VocabularySize);
        }

        return Send(prompt, arrival.AnswerTokens, arrival.Time, slo);
    }

    private Func<EngineLoop, FinetuningJob> StartJob(int index)
    {
        var samples = new List<TrainingSample>();
        for (int i = 0; i < _scenario.Samples; i++)
        {
            int[] ids = new int[_random.Next(_scenario.SampleTokens.Min, _scenario.SampleTokens.End)];
            samples.Add(TrainingSample.FromTokens(ids, Enumerable.Repeat(true, ids.Length).ToArray()));
        }

        var request = new FinetuningRequest
        {
            Adapter = $"job{index}",
            Dataset = TrainingDataset.FromExamples([]),
            Method = new LoraConfig { Rank = 16, TargetModules = ["q_proj", "v_proj", "down_proj"] },
            Epochs = _scenario.Epochs,
            GradientAccumulation = _scenario.GradientAccumulation,
            Weight = index < _scenario.JobWeights.Length ? _scenario.JobWeights[index] : 1.0,
            Priority = _scenario.JobPriorities.ElementAtOrDefault(index),
        };
        return loop => loop.Jobs.Start(_inbox, request, new BuiltSamples(samples, 0, 0, 0), loop.Now);
    }

    private void Record(TimeSpan begun)
    {
        if (Loop.LastPlan is not StepPlan plan)
        {
            return; // Given up.
        }

        _steps.Add(new StepRecord(begun, Now - begun, plan, Loop.LastItems));
        Check.That(_steps.Count < StepsMax, "the simulation does not end");
        Check.That(_steps.Count == Loop.Counters.Steps);
        _finetuningSteps += plan.HasFinetuning ? 1 : 0;
        Check.That(_finetuningSteps == Loop.Counters.FinetuningSteps);
        CheckBlocks(Loop, _active);
        foreach (SimulatedRequest request in _active.Where(r => r.Submitted.IsCompletedSuccessfully))
        {
            if (request.Sequence.Generated > request.TokenTimes.Count)
            {
                request.TokenTimes.Add(request.Sequence.LastTokenTime!.Value);
            }

            while (request.Sequence.Stream.TryRead(out _))
            {
            }
        }

        _active.RemoveAll(r => r.IsDone || r.Submitted.IsFaulted);
    }
}
