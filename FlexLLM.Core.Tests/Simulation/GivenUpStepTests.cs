using FlexLLM.Backends;
using FlexLLM.Engine;
using FlexLLM.Scheduling;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>A forward window of an idle engine, and who comes while it computes.</summary>
[TestFixture]
[Parallelizable]
internal sealed class GivenUpStepTests
{
    private const string InWindow = nameof(IComputeBackend.Attention); // Once a layer.

    private static readonly Scenario Idle = new() { Workload = Workload.None };

    private static readonly TimeSpan LayerMost = new StepLimits().BackwardItemTimeMax;

    [Test]
    public void Request_EarlyInAWindow_IsServedNextAndTheWindowRunsAgain()
    {
        using Run run = Run.WithCall(Idle, atLayer: 0, sim => sim.Send(new int[32], answerTokens: 1));

        Assert.That(run.Loop.Counters.StepsGivenUp, Is.EqualTo(1));
        Assert.That(run.Waited, Is.LessThan(LayerMost), "the rest of one layer");
        Assert.That(run.Next.Plan.Inference, Is.Not.Empty, "the next step is its own");

        ForwardWindow again = run.Simulation.Run(_ => run.Forward.Any()).Steps[^1].Plan.Forward.Single();
        Assert.That(again.Id, Is.EqualTo(run.Window.Id));
        Assert.That(run.Loop.Jobs.TokensTrained, Is.EqualTo(again.Tokens), "no token of the window that was given up counts");
    }

    // Less would be won than lost. The longest wait is half of a step that may take twice as long as an arrival may wait.
    [Test]
    public void Request_LateInAWindow_WaitsForItsEnd()
    {
        using Run run = Run.WithCall(Idle, atLayer: Scenario.Model.LayerCount - 1, sim => sim.Send(new int[32], answerTokens: 1));

        Assert.That(run.Loop.Counters.StepsGivenUp, Is.Zero);
        Assert.That(run.Loop.Jobs.TokensTrained, Is.EqualTo(run.Window.Tokens));
        Assert.That(run.Waited, Is.LessThanOrEqualTo(run.Loop.Limits.IdleStepMax));
    }

    [Test]
    public void OtherCall_EarlyInAWindow_WaitsForItsEnd()
    {
        using Run run = Run.WithCall(Idle, atLayer: 0, sim => sim.Callers.Call(loop => loop.Now));

        Assert.That(run.Loop.Counters.StepsGivenUp, Is.Zero);
        Assert.That(run.Loop.Jobs.TokensTrained, Is.EqualTo(run.Window.Tokens));
    }

    // The rig: a baseline gives nothing up.
    [Test]
    public void Request_EarlyInAWindowOfTheFixedBudget_WaitsForTheStep()
    {
        Scenario scenario = Idle with { Sharing = SharingPolicy.FixedBudget(4) };
        using Run run = Run.WithCall(scenario, atLayer: 0, sim => sim.Send(new int[32], answerTokens: 1));

        Assert.That(run.Loop.Counters.StepsGivenUp, Is.Zero);
    }

    // Each request comes in the first layer of a window and is gone when the next window begins.
    [Test]
    public void Requests_InEveryWindow_DoNotStopTheJob()
    {
        EngineSimulation? run = null;
        StepPlan? called = null;
        var trained = new List<long>(); // By the windows in which somebody came.
        using (run = new EngineSimulation(Idle with { Samples = 4, Epochs = 1, Probe = OnOperation }, seed: 1))
        {
            run.Run(s => s.Jobs[0].IsCompleted && s.Jobs[0].Result.Completion.IsCompleted);

            Assert.That(run.Jobs[0].Result.Completion.IsCompletedSuccessfully, Is.True);
            Assert.That(run.Loop.Counters.StepsGivenUp, Is.GreaterThan(2), "else the rule was not needed");
            Assert.That(trained.GroupBy(tokens => tokens).Max(same => same.Count()), Is.LessThanOrEqualTo(2), "never twice running");
        }

        void OnOperation(string operation)
        {
            if (operation == InWindow && run?.Loop.LastPlan is { Forward.Length: > 0, Inference.IsEmpty: true } plan && plan != called)
            {
                called = plan;
                trained.Add(run.Loop.Jobs.TokensTrained);
                run.Send(new int[8], answerTokens: 1);
            }
        }
    }

    [Test]
    public void IdleBudget_WhereStepsAreGivenUp_IsTwiceWhatAnArrivalMayWait()
    {
        using var run = new EngineSimulation(Idle, seed: 1);
        run.Run(s => s.Steps.Count > 0);

        Assert.That(run.Steps[0].Plan.Budget, Is.EqualTo(run.Loop.Limits.IdleStepMax * 2.0));
    }

    // An idle engine in whose first forward window somebody calls.
    private sealed class Run : IDisposable
    {
        private int _steps;

        private Run(EngineSimulation simulation) => Simulation = simulation;

        public EngineSimulation Simulation { get; }

        public EngineLoop Loop => Simulation.Loop;

        public ForwardWindow Window { get; private set; }

        /// <summary>From the call to the end of the step.</summary>
        public TimeSpan Waited { get; private set; }

        /// <summary>The step after it.</summary>
        public StepRecord Next => Simulation.Run(s => s.Steps.Count > _steps).Steps[_steps];

        public IEnumerable<StepRecord> Forward => Simulation.Steps.Where(s => !s.Plan.Forward.IsEmpty);

        public static Run WithCall(Scenario scenario, int atLayer, Action<EngineSimulation> call)
        {
            EngineSimulation? simulation = null;
            TimeSpan? called = null;
            ForwardWindow window = default;
            int layers = 0;
            simulation = new EngineSimulation(scenario with { Probe = OnOperation }, seed: 1);
            simulation.Run(_ => called is not null);
            return new Run(simulation) { Window = window, Waited = simulation.Now - called!.Value, _steps = simulation.Steps.Count };

            void OnOperation(string operation)
            {
                if (operation != InWindow || called is not null || simulation?.Loop.LastPlan is not { Forward.Length: 1 } plan)
                {
                    return;
                }

                if (layers++ == atLayer)
                {
                    (called, window) = (simulation.Now, plan.Forward[0]);
                    call(simulation);
                }
            }
        }

        public void Dispose() => Simulation.Dispose();
    }
}
