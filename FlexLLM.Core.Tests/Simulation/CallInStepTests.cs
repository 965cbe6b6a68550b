using FlexLLM.Backends;
using FlexLLM.Engine;
using FlexLLM.Scheduling;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>What a step that has begun does for a caller who comes while it computes.</summary>
[TestFixture]
[Parallelizable]
internal sealed class CallInStepTests
{
    private static readonly Scenario Idle = new() { Workload = Workload.None };

    // A layer's backward pass of any window contains exactly one of these.
    private const string InItem = nameof(IComputeBackend.AttentionBackward);

    [Test]
    public void Call_DuringABackwardItemOfAnIdleEngine_EndsTheStepAfterThatItem()
    {
        (StepRecord step, TimeSpan waited, InferenceSequence sequence) = StepWithCall(Idle);

        Assert.That(step.Plan.Backward.Length, Is.GreaterThan(2), "else there was nothing to leave out");
        Assert.That(waited, Is.LessThanOrEqualTo(new StepLimits().BackwardItemTimeMax), "the rest of one item");
        Assert.That(sequence.Generated, Is.EqualTo(1), "the next step is its own");
    }

    // The rig: a mode that is described as not preempting makes the caller wait for all items.
    [Test]
    public void Call_DuringABackwardItemOfTheFixedBudget_WaitsForTheStep()
    {
        (StepRecord step, TimeSpan waited, _) = StepWithCall(Idle with { Sharing = SharingPolicy.FixedBudget(4) });

        Assert.That(step.Plan.Backward.Length, Is.GreaterThan(2));
        Assert.That(waited, Is.GreaterThan(new StepLimits().BackwardItemTimeMax * 1.5));
    }

    // With requests beside, the step keeps to its budget, which is all that a caller has to wait.
    [Test]
    public void Call_WhileOthersDecode_WaitsNoLongerThanTheLongestFinetuningOfAStep()
    {
        var busy = new Workload { Requests = 20, RequestsPerSecond = 4.0, AnswerMean = 200 };
        using var run = new EngineSimulation(Idle with { Workload = busy }, seed: 3);
        run.RunRequests();

        StepLimits limits = run.Loop.Limits;
        StepRecord[] shared = [.. run.Steps.Where(s => s.Plan.HasFinetuning && s.Plan.Inference.Length > 0)];
        Assert.That(shared, Is.Not.Empty);
        foreach (StepRecord step in shared)
        {
            TimeSpan own = run.Loop.Latency.Predict(step.Plan.Features.WithoutFinetuning());
            Assert.That(step.Plan.Budget - own, Is.LessThanOrEqualTo(limits.IdleStepMax * 1.5), "the model learnt meanwhile");
        }
    }

    [Test]
    public void Calls_WithoutEnd_DoNotStopTheJob()
    {
        using var run = new EngineSimulation(Idle with { Samples = 2, Epochs = 1 }, seed: 1);
        run.Run(s => s.Jobs[0].IsCompleted);
        CallAgain();
        run.Run(s => s.Jobs[0].Result.Completion.IsCompleted);
        Assert.That(run.Jobs[0].Result.Completion.IsCompletedSuccessfully, Is.True);

        void CallAgain() => run.Callers.Call(loop =>
        {
            CallAgain();
            return loop.Now;
        });
    }

    // Runs until a request was sent in the first backward item of a step with several, and one step more.
    private static (StepRecord Step, TimeSpan Waited, InferenceSequence Sequence) StepWithCall(Scenario scenario)
    {
        EngineSimulation? run = null;
        Task<InferenceSequence>? submitted = null;
        TimeSpan called = default;
        int stepCalled = 0;
        using (run = new EngineSimulation(scenario with { Probe = OnOperation }, seed: 1))
        {
            run.Run(s => submitted is not null && s.Steps.Count > stepCalled + 1);
            StepRecord step = run.Steps[stepCalled];
            return (step, step.Begun + step.Took - called, submitted!.Result);
        }

        void OnOperation(string operation)
        {
            bool isFirst = operation == InItem && submitted is null && run?.Loop.LastPlan is { Backward.Length: > 2 };
            if (isFirst)
            {
                (called, stepCalled) = (run!.Now, run.Steps.Count);
                submitted = run.Send(new int[32], answerTokens: 4).Submitted;
            }
        }
    }
}
