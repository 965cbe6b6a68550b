using FlexLLM.Scheduling;
using NUnit.Framework;

namespace FlexLLM.Tests.Scheduling;

/// <summary>Long random loads through the scheduler: every plan feasible, every request answered, targets kept.</summary>
[TestFixture]
[Parallelizable]
internal sealed class ServingSimulationTests
{
    private static readonly StepLimits Limits = new() { TokensPerStepMax = 256, SequencesMax = 32 };
    private static readonly ServingSimulation.Load Light = new();
    private static readonly ServingSimulation.Load FewBlocks = new() { Blocks = 60, RequestsPerSecond = 40.0 };

    [Test]
    public void Run_LightLoad_KeepsTargetsAndTrains([Range(1, 5)] int seed)
    {
        ServingSimulation run = new ServingSimulation((ulong)seed, Light, Limits).Run();

        Assert.That(run.TpotAttained, Is.GreaterThanOrEqualTo(0.95));
        Assert.That(run.TtftAttained, Is.GreaterThanOrEqualTo(0.95));
        Assert.That(run.Served.Sum(), Is.GreaterThan(2_000 * run.Now.TotalSeconds));
    }

    [Test]
    public void Run_FewBlocks_AnswersEveryRequest([Range(1, 5)] int seed)
    {
        ServingSimulation.Load load = FewBlocks with { PriorityLevels = 3 };

        Assert.That(() => new ServingSimulation((ulong)seed, load, Limits).Run(), Throws.Nothing);
    }

    [Test]
    public void Run_OddLimits_AnswersEveryRequest([Range(1, 10)] int seed)
    {
        StepLimits odd = Limits with
        {
            TokensPerStepMax = 7,
            SequencesMax = 5,
            PrefillChunkMin = 3,
            PrefillChunkMax = 4,
            BackwardRowsMax = 11,
            GrowthHorizon = 0,
            SkipAheadMax = seed % 3,
        };
        ServingSimulation.Load load = FewBlocks with { Requests = 20, Blocks = 36, AnswerMax = 40, PromptMax = 120 };

        Assert.That(() => new ServingSimulation((ulong)seed, load, odd).Run(), Throws.Nothing);
    }

    [Test]
    public void Run_SameSeed_SameOutcome()
    {
        ServingSimulation a = new ServingSimulation(3, FewBlocks, Limits).Run();
        ServingSimulation b = new ServingSimulation(3, FewBlocks, Limits).Run();

        Assert.That((a.Now, a.Steps, a.Latency), Is.EqualTo((b.Now, b.Steps, b.Latency)));
    }

    [Test]
    public void Run_Finetuning_CostsRequestsNoTarget()
    {
        ServingSimulation without = new ServingSimulation(4, Light with { Jobs = 0 }, Limits).Run();
        ServingSimulation with = new ServingSimulation(4, Light, Limits).Run();

        Assert.That(with.TpotAttained, Is.GreaterThanOrEqualTo(without.TpotAttained - 0.05));
        Assert.That(with.TtftAttained, Is.GreaterThanOrEqualTo(without.TtftAttained - 0.05));
    }

    [Test]
    public void Run_TwoJobs_ShareByWeight()
    {
        ServingSimulation run = new ServingSimulation(5, Light with { Requests = 120 }, Limits).Run();

        Assert.That(run.Served[1] / (double)run.Served[0], Is.InRange(1.4, 2.6), "weights 1 and 2, leftovers to the other");
    }

    [Test]
    public void Run_Growth_SavesPreemptions()
    {
        Assert.That(Preemptions(Limits with { GrowthHorizon = 0 }), Is.GreaterThan(2 * Preemptions(Limits)));

        static int Preemptions(StepLimits limits) =>
            Enumerable.Range(1, 3).Sum(seed => new ServingSimulation((ulong)seed, FewBlocks, limits).Run().Preemptions);
    }

    [Test]
    public void Run_LowPriority_IsNotStarved()
    {
        StepLimits limits = Limits with { AgeingPerPriority = TimeSpan.FromSeconds(3) };
        ServingSimulation run = new ServingSimulation(6, FewBlocks with { PriorityLevels = 2, Requests = 100 }, limits).Run();

        Assert.That(run.LongestTtft(1), Is.LessThan(run.LongestTtft(0)));
        Assert.That(run.LongestTtft(0), Is.LessThan(run.Now * 0.9), "not all of them last");
    }

    // Controls: what the simulation must not let pass.

    [Test]
    public void Run_PlannerThatIgnoresGrowth_IsDetected() => Detects("more blocks than there are", FewBlocks, (plan, now) =>
        plan with { Preemptions = [], Inference = [.. plan.Inference, .. Dropped(plan, now)] });

    [Test]
    public void Run_PlannerThatForgetsADecode_IsDetected() => Detects("a decode without its token", Light, (plan, _) =>
        plan.Admissions.IsEmpty ? plan with { Inference = [.. plan.Inference.Skip(1)] } : plan);

    [Test]
    public void Run_PlannerThatStarves_IsDetected()
    {
        static StepPlan Planner(EngineSnapshot now, StepLimits limits, LatencyModel latency) => HybridTokenScheduler.Plan(
            now with { Sequences = [.. now.Sequences.Where(s => s.Id.Value != 5)] }, limits, latency);

        Assert.That(
            () => new ServingSimulation(1, Light, Limits, Planner).Run(stepsMax: 5_000),
            Throws.TypeOf<SimulationFaultException>().With.Message.Contains("not answered"));
    }

    [Test]
    public void Run_PlannerThatOverfillsTheBudget_IsDetected() => Detects("past the budget", Light, (plan, now) =>
    {
        int job = plan.Forward.IsEmpty ? -1 : (int)plan.Forward[0].Id.Value;
        int rowsLeft = Limits.TokensPerStepMax - plan.Features.InferenceRows;
        int most = job < 0 || now.Sequences.IsEmpty ? 0 : Math.Min(now.Jobs[job].ForwardTokensLeft, rowsLeft);
        return plan.Forward.Length != 1 || plan.Forward[0].Tokens >= most
            ? plan
            : plan with { Forward = [plan.Forward[0] with { Tokens = plan.Forward[0].Tokens + 1 }] };
    });

    private static IEnumerable<InferenceWork> Dropped(StepPlan plan, EngineSnapshot now) => now.Sequences
        .Where(s => plan.Preemptions.Contains(s.Id))
        .Select(s => new InferenceWork(s.Id, 1, s.TokensComputed));

    private static bool EndsPrompt(EngineSnapshot now, InferenceWork work) =>
        now.Sequences.Single(s => s.Id == work.Id).TokensLeft == work.Tokens;

    /// <summary>
    /// Runs with a planted fault. Sizes and predictions are made consistent, so that only the fault itself shows.
    /// </summary>
    private static void Detects(string fault, ServingSimulation.Load load, Func<StepPlan, EngineSnapshot, StepPlan> plant)
    {
        StepPlan Planner(EngineSnapshot now, StepLimits limits, LatencyModel latency)
        {
            StepPlan plan = plant(HybridTokenScheduler.Plan(now, limits, latency), now);
            StepFeatures features = default;
            features = plan.Inference.Aggregate(
                features, (f, w) => f.WithInference(w.ContextLength, w.Tokens, EndsPrompt(now, w) ? 1 : 0));
            features = plan.Forward.Aggregate(
                features, (f, w) => f.WithForward(now.Jobs[(int)w.Id.Value].PositionsDone, w.Tokens));
            features = plan.Backward.Aggregate(features, (f, w) => f.WithBackward(w.RowStart, w.RowCount));
            return plan with { Features = features, LatencyPredicted = latency.Predict(features) };
        }

        var run = new ServingSimulation(1, load, Limits with { GrowthHorizon = 0 }, Planner);
        Assert.That(() => run.Run(stepsMax: 5_000), Throws.TypeOf<SimulationFaultException>().With.Message.Contains(fault));
    }
}
