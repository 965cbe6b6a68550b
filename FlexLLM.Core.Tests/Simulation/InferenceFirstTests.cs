using FlexLLM.Scheduling;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>Law 3, inference first, on the engine's own loop: finetuning takes what requests leave, and most of that.</summary>
[TestFixture]
[Parallelizable]
internal sealed class InferenceFirstTests
{
    private const int WarmUpSteps = 100;

    // So many that chance does not decide about a share of one in a hundred.
    private const int Seeds = 9;

    // How far a linear model may be off on a machine that is the slower of two lines.
    private const double ErrorBound = 0.1;

    // The machine answers 22 such requests a second.
    private static readonly Workload Light = new() { Requests = 50, RequestsPerSecond = 1.1 };
    private static readonly Workload Medium = new() { Requests = 120, RequestsPerSecond = 9.0 };
    private static readonly Workload Heavy = new() { Requests = 200, RequestsPerSecond = 18.0 };

    private static IEnumerable<TestCaseData> Loads =>
        [new TestCaseData(Light).SetArgDisplayNames("light"), new TestCaseData(Medium).SetArgDisplayNames("medium"),
            new TestCaseData(Heavy).SetArgDisplayNames("heavy")];

    [TestCaseSource(nameof(Loads))]
    public void Finetuning_BesideRequests_KeepsBudgetsAndCostsNoTarget(Workload load)
    {
        var steps = new List<StepRecord>();
        var with = new List<SimulatedRequest>();
        var without = new List<SimulatedRequest>();
        double trained = 0;
        for (ulong seed = 1; seed <= Seeds; seed++)
        {
            var scenario = new Scenario { Workload = load };
            using EngineSimulation both = new EngineSimulation(scenario, seed).RunRequests();
            using EngineSimulation alone = new EngineSimulation(scenario with { Jobs = 0 }, seed).RunRequests();
            steps.AddRange(both.Steps.Skip(WarmUpSteps));
            trained += both.TokensTrainedPerSecond / Seeds;
            with.AddRange(both.Requests);
            without.AddRange(alone.Requests);
        }

        double over = EngineSimulation.OverBudget(steps);
        double farOver = EngineSimulation.OverBudget(steps, ErrorBound);
        TestContext.Out.WriteLine(
            $"{steps.Count} steps, {trained:F0} tokens/s trained, over budget {over:P2}, beyond the error bound {farOver:P2}, " +
            $"TPOT {Share(without, r => r.MetTpot):P1} -> {Share(with, r => r.MetTpot):P1}, " +
            $"TTFT {Share(without, r => r.MetTtft):P1} -> {Share(with, r => r.MetTtft):P1}");
        Assert.That(over, Is.LessThan(0.01), "the model promises 0.01 of the steps that fill their budget");
        Assert.That(farOver, Is.LessThan(0.01));
        Assert.That(Share(with, r => r.MetTpot), Is.GreaterThanOrEqualTo(Share(without, r => r.MetTpot) - 0.01));
        Assert.That(Share(with, r => r.MetTtft), Is.GreaterThanOrEqualTo(Share(without, r => r.MetTtft) - 0.01));
    }

    [Test]
    public void Finetuning_NoisyMachine_KeepsBudgets()
    {
        var scenario = new Scenario { Workload = Medium, Machine = Scenario.EighthOfA100 with { Jitter = 0.05 } };
        var steps = new List<StepRecord>();
        for (ulong seed = 1; seed <= 3; seed++)
        {
            using EngineSimulation run = new EngineSimulation(scenario, seed).RunRequests();
            steps.AddRange(run.Steps.Skip(WarmUpSteps));
        }

        double farOver = EngineSimulation.OverBudget(steps, ErrorBound);
        TestContext.Out.WriteLine($"over budget {EngineSimulation.OverBudget(steps):P2}, beyond the error bound {farOver:P2}");
        Assert.That(EngineSimulation.OverBudget(steps), Is.LessThan(0.01));
        Assert.That(farOver, Is.LessThan(0.01));
    }

    [Test]
    public void Finetuning_LightLoad_GetsMostOfTheMachine()
    {
        using EngineSimulation idle = new EngineSimulation(new Scenario { Workload = Workload.None }, 1)
            .Run(s => s.Now > TimeSpan.FromSeconds(40));
        using EngineSimulation light = new EngineSimulation(new Scenario { Workload = Light }, 1).RunRequests();

        double share = light.TokensTrainedPerSecond / idle.TokensTrainedPerSecond;
        TestContext.Out.WriteLine($"{idle.TokensTrainedPerSecond:F0} tokens/s alone, {share:P0} beside requests");
        Assert.That(share, Is.GreaterThan(0.8));
    }

    [Test]
    public void Finetuning_BurstWithoutSlack_IsZeroInThatStep([Range(1, 3)] int seed)
    {
        Workload load = Light with { Requests = 20, BurstRequests = 80, BurstTime = TimeSpan.FromSeconds(8), PromptMean = 500 };
        using EngineSimulation run = new EngineSimulation(new Scenario { Workload = load }, (ulong)seed).RunRequests();

        StepRecord[] after = [.. run.Steps.SkipWhile(s => s.Begun < load.BurstTime)];
        Assert.That(run.Steps.SkipLast(after.Length).TakeLast(5).Any(s => s.Plan.HasFinetuning), Is.True, "just before");
        Assert.That(after[0].Plan.HasFinetuning, Is.False, "the step that sees the burst");
        Assert.That(after.Any(s => s.Plan.HasFinetuning), Is.True, "later");
    }

    /// <summary>The control: a model that believes that nothing takes time must be caught by the same check.</summary>
    [Test]
    public void Control_ModelThatPredictsNothing_IsOverBudget()
    {
        using var run = new EngineSimulation(new Scenario { Workload = Medium }, 1);
        run.Loop.Latency = new LatencyModel(default, Correction: 1.0, Tail: 1.0);

        run.RunRequests();

        Assert.That(EngineSimulation.OverBudget(run.Steps.Skip(WarmUpSteps), ErrorBound), Is.GreaterThan(0.1));
    }

    private static double Share(List<SimulatedRequest> requests, Func<SimulatedRequest, bool> target) =>
        requests.Count(target) / (double)requests.Count;
}
