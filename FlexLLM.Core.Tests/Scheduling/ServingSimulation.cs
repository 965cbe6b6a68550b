using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Tests.Scheduling;

/// <summary>A plan that cannot be carried out, or a load that never ends.</summary>
internal sealed class SimulationFaultException(string message) : Exception(message);

/// <summary>
/// Plays plans against a machine that exists only as a latency formula, and throws on the first plan that breaks a rule:
/// blocks, rows, cursors, budget. Everything follows from the seed.
/// </summary>
internal sealed class ServingSimulation
{
    internal delegate StepPlan Planner(EngineSnapshot now, StepLimits limits, LatencyModel latency);

    /// <summary>About a small model on a GPU: 8 ms a step, 20 us a row.</summary>
    public static readonly LatencyCoefficients Machine = LatencyCoefficients.Linear(
        step: 8e-3, row: 2e-5, context: 2e-9, forwardWindow: 1e-3, forwardRow: 3e-5, forwardContext: 3e-9,
        backwardItem: 5e-4, backwardRow: 2e-6, backwardContext: 2e-10);

    public sealed record Load
    {
        public int Requests { get; init; } = 60;

        public double RequestsPerSecond { get; init; } = 8.0;

        public int PromptMax { get; init; } = 400;

        public int AnswerMax { get; init; } = 150;

        public int Blocks { get; init; } = 400;

        public int Jobs { get; init; } = 2;

        public int PriorityLevels { get; init; } = 1;

        public TimeSpan Tpot { get; init; } = TimeSpan.FromMilliseconds(30);

        public TimeSpan Ttft { get; init; } = TimeSpan.FromSeconds(1);
    }

    private sealed class Sequence
    {
        public required SequenceSnapshot Seen { get; set; }

        public required int AnswerTokens { get; init; }

        public TimeSpan LastTokenTime { get; set; }
    }

    private const int Layers = 4;

    private readonly Load _load;
    private readonly StepLimits _limits;
    private readonly Planner _planner;
    private readonly List<Sequence> _arriving = [];
    private readonly List<Sequence> _live = [];
    private readonly List<Sequence> _done = [];
    private readonly JobSnapshot[] _jobs;
    private SeededRandom _random;
    private int _freeBlocks;

    public ServingSimulation(ulong seed, Load load, StepLimits limits, Planner? planner = null)
    {
        limits.Validate();
        (_load, _limits, _random, _freeBlocks) = (load, limits, new SeededRandom(seed), load.Blocks);
        _planner = planner ?? ((now, l, latency) => HybridTokenScheduler.Plan(now, l, latency));
        TimeSpan arrival = TimeSpan.Zero;
        for (int i = 0; i < load.Requests; i++)
        {
            arrival += TimeSpan.FromSeconds(-Math.Log(1.0 - _random.NextDouble()) / load.RequestsPerSecond);
            int prompt = _random.Next(1, load.PromptMax + 1);
            _arriving.Add(new Sequence
            {
                AnswerTokens = _random.Next(1, load.AnswerMax + 1),
                Seen = new SequenceSnapshot
                {
                    Id = new SequenceId(i),
                    Phase = SequencePhase.Waiting,
                    TokensTotal = prompt,
                    TokensMax = prompt + load.AnswerMax,
                    Priority = _random.Next(load.PriorityLevels),
                    ArrivalTime = arrival,
                    TpotTarget = load.Tpot,
                    TtftTarget = load.Ttft,
                },
            });
        }

        _jobs = [.. Enumerable.Range(0, load.Jobs).Select(i => NextSample(new JobSnapshot
        {
            Id = new JobId(i),
            Weight = i + 1.0,
            Phase = JobPhase.Forward,
        }))];
    }

    public TimeSpan Now { get; private set; }

    public int Steps { get; private set; }

    public int Preemptions { get; private set; }

    public LatencyModel Latency { get; private set; } = LatencyModel.Default;

    /// <summary>Work done for each job, in tokens through all layers forward or backward.</summary>
    public long[] Served => [.. _jobs.Select(j => j.ServedTokens)];

    public double TpotAttained => _done.Count(s => TpotOf(s) <= s.Seen.TpotTarget) / (double)_done.Count;

    public double TtftAttained =>
        _done.Count(s => s.Seen.FirstTokenTime - s.Seen.ArrivalTime <= s.Seen.TtftTarget) / (double)_done.Count;

    public TimeSpan LongestTtft(int priority) =>
        _done.Where(s => s.Seen.Priority == priority).Max(s => s.Seen.FirstTokenTime!.Value - s.Seen.ArrivalTime);

    /// <summary>Runs until every request is answered.</summary>
    public ServingSimulation Run(int stepsMax = 20_000)
    {
        while (_arriving.Count + _live.Count > 0)
        {
            Require(Steps++ < stepsMax, $"{_live.Count} requests are not answered after {stepsMax} steps");
            Step();
        }

        return this;
    }

    private void Step()
    {
        while (_arriving.Count > 0 && _arriving[0].Seen.ArrivalTime <= Now)
        {
            _live.Add(_arriving[0]);
            _arriving.RemoveAt(0);
        }

        var snapshot = new EngineSnapshot
        {
            Now = Now,
            Sequences = [.. _live.Select(s => s.Seen)],
            Jobs = [.. _jobs],
            FreeBlocks = _freeBlocks,
            TotalBlocks = _load.Blocks,
            TokensPerBlock = 16,
        };
        StepPlan plan = _planner(snapshot, _limits, Latency);
        if (plan.IsEmpty)
        {
            Require(_live.Count == 0 && _load.Jobs == 0, "an empty plan with work to do");
            Now = _arriving[0].Seen.ArrivalTime;
            return;
        }

        StepFeatures features = Carry(plan, snapshot);
        Require(features == plan.Features, "the plan's size is not its work's");
        bool least = _live.Count == 0 && features.ForwardRows + features.BackwardRows == 1;
        Require(!plan.HasFinetuning || least || plan.LatencyPredicted <= plan.Budget, "finetuning past the budget");
        double noise = Math.Exp(0.03 * _random.NextGaussian());
        TimeSpan time = TimeSpan.FromSeconds(Machine.Dot(features) * noise);
        Latency = Latency.Observe(features, time);
        Now += time;
        Commit(plan);
    }

    private StepFeatures Carry(StepPlan plan, EngineSnapshot snapshot)
    {
        foreach (SequenceId id in plan.Preemptions)
        {
            Sequence s = Find(id);
            Require(s.Seen.Phase == SequencePhase.Running, "a preemption of what does not run");
            _freeBlocks += s.Seen.BlocksHeld;
            s.Seen = s.Seen with { Phase = SequencePhase.Waiting, TokensComputed = 0, BlocksHeld = 0 };
            Preemptions++;
        }

        foreach (SequenceId id in plan.Admissions)
        {
            Sequence s = Find(id);
            Require(s.Seen.Phase == SequencePhase.Waiting, "an admission of what does not wait");
            s.Seen = s.Seen with { Phase = SequencePhase.Running };
        }

        Require(_live.Count(s => s.Seen.Phase == SequencePhase.Running) <= _limits.SequencesMax, "too many sequences");
        Require(plan.Inference.Select(w => w.Id).Distinct().Count() == plan.Inference.Length, "a sequence twice");
        Require(plan.Admissions.All(id => plan.Inference.Any(w => w.Id == id)), "an admission without work");
        StepFeatures features = default;
        foreach (InferenceWork work in plan.Inference)
        {
            Sequence s = Find(work.Id);
            Require(s.Seen.Phase == SequencePhase.Running, "work for what does not run");
            Require(work.ContextLength == s.Seen.TokensComputed, "work at another position");
            Require(work.Tokens >= 1 && work.Tokens <= s.Seen.TokensLeft, "tokens that are not there");
            features = features.WithInference(work.ContextLength, work.Tokens, work.Tokens == s.Seen.TokensLeft ? 1 : 0);
            int blocks = Math.Max(0, snapshot.BlocksFor(work.ContextLength + work.Tokens) - s.Seen.BlocksHeld);
            _freeBlocks -= blocks;
            Require(_freeBlocks >= 0, "more blocks than there are");
            s.Seen = s.Seen with { TokensComputed = work.ContextLength + work.Tokens, BlocksHeld = s.Seen.BlocksHeld + blocks };
        }

        foreach (Sequence s in _live.Where(s => s.Seen.IsDecoding))
        {
            Require(plan.Inference.Any(w => w.Id == s.Seen.Id), "a decode without its token");
        }

        foreach (ForwardWindow window in plan.Forward)
        {
            JobSnapshot job = _jobs[window.Id.Value];
            Require(job.Phase == JobPhase.Forward, "a forward window in another phase");
            Require(window.Tokens >= 1 && window.Tokens <= job.ForwardTokensLeft, "a forward window's size");
            features = features.WithForward(job.PositionsDone, window.Tokens);
            job = job with { PositionsDone = job.PositionsDone + window.Tokens, ServedTokens = job.ServedTokens + window.Tokens };
            _jobs[window.Id.Value] = job.ForwardTokensLeft > 0 ? job : job with
            {
                Phase = JobPhase.Backward,
                Layer = Layers - 1,
                LowestLayer = 0,
                RowsLeft = job.SampleTokens,
            };
        }

        Require(features.InferenceRows + features.ForwardRows <= _limits.TokensPerStepMax, "too many rows");
        foreach (BackwardWindow window in plan.Backward)
        {
            JobSnapshot job = _jobs[window.Id.Value];
            Require(snapshot.Jobs[(int)window.Id.Value].Phase == JobPhase.Backward, "a backward window");
            Require(window.Layer == job.Layer && window.RowStart + window.RowCount == job.RowsLeft, "a window off the cursor");
            bool sized = window.RowStart >= 0 && window.RowCount >= 1 && window.RowCount <= _limits.BackwardRowsMax;
            Require(sized, "a backward window's size");
            features = features.WithBackward(window.RowStart, window.RowCount);
            job = job with { RowsLeft = window.RowStart, ServedTokens = job.ServedTokens + (window.RowCount / Layers) };
            if (job.RowsLeft == 0)
            {
                job = job.Layer == 0 ? NextSample(job) : job with { Layer = job.Layer - 1, RowsLeft = job.SampleTokens };
            }

            _jobs[window.Id.Value] = job;
        }

        return features;
    }

    private void Commit(StepPlan plan)
    {
        foreach (InferenceWork work in plan.Inference)
        {
            Sequence s = Find(work.Id);
            if (s.Seen.TokensLeft > 0)
            {
                continue;
            }

            s.LastTokenTime = Now;
            s.Seen = s.Seen with
            {
                TokensTotal = s.Seen.TokensTotal + 1,
                TokensGenerated = s.Seen.TokensGenerated + 1,
                FirstTokenTime = s.Seen.FirstTokenTime ?? Now,
            };
            if (s.Seen.TokensGenerated == s.AnswerTokens)
            {
                _freeBlocks += s.Seen.BlocksHeld;
                _live.Remove(s);
                _done.Add(s);
            }
        }

        Require(_freeBlocks + _live.Sum(s => s.Seen.BlocksHeld) == _load.Blocks, "blocks lost");
    }

    private JobSnapshot NextSample(JobSnapshot job) =>
        job with { Phase = JobPhase.Forward, SampleTokens = _random.Next(1, 700), PositionsDone = 0, RowsLeft = 0 };

    private Sequence Find(SequenceId id) =>
        _live.Find(s => s.Seen.Id == id) ?? throw new SimulationFaultException($"sequence {id.Value} does not live");

    private static TimeSpan TpotOf(Sequence s) =>
        s.AnswerTokens == 1 ? TimeSpan.Zero : (s.LastTokenTime - s.Seen.FirstTokenTime!.Value) / (s.AnswerTokens - 1);

    private static void Require(bool holds, string fault)
    {
        if (!holds)
        {
            throw new SimulationFaultException(fault);
        }
    }
}
