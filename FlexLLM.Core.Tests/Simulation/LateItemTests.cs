using FlexLLM.Scheduling;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>What a step leaves out when the machine stands still in its middle.</summary>
[TestFixture]
[Parallelizable]
internal sealed class LateItemTests
{
    private static readonly Workload Busy = new() { Requests = 20, RequestsPerSecond = 8.0, AnswerMean = 200 };

    [TestCase(0.3)]
    [TestCase(0.5)]
    [TestCase(0.7)]
    public void StalledBatch_LeavesOutItemsThatMayEndAfterTheBudget(double stalled)
    {
        (StepRecord step, LatencyModel model) = StepWithStall(Busy, plan => Most(plan) + (plan.LatencyPredicted * stalled));

        Assert.That(step.Items, Is.LessThan(step.Plan.Backward.Length));
        Assert.That(step.Took, Is.LessThanOrEqualTo(step.Plan.Budget));
        BackwardWindow left = step.Plan.Backward[step.Items];
        TimeSpan itself = model.Predict(default(StepFeatures).WithBackward(left.RowStart, left.RowCount));
        Assert.That(step.Took + itself, Is.GreaterThan(step.Plan.Budget), "there was no time for one more");
    }

    // The rig: as long as the plan has room for the stall, nothing is left out.
    [Test]
    public void StalledBatch_WithinTheBudget_LeavesOutNothing()
    {
        (StepRecord step, _) = StepWithStall(Busy, Most);

        Assert.That(step.Items, Is.EqualTo(step.Plan.Backward.Length));
        Assert.That(step.Took, Is.LessThanOrEqualTo(step.Plan.Budget));
    }

    // Nobody waits, but somebody may call: the longest step of an idle engine is a promise too. A machine that is always late must not
    // stop the job, so the first item is done in any case.
    [TestCase(0.5)]
    [TestCase(5.0)]
    public void StalledIdleStep_DoesItsFirstItemAndNoneThatMayEndAfterTheBudget(double stalled)
    {
        (StepRecord step, _) = StepWithStall(Workload.None, plan => Most(plan) + (plan.LatencyPredicted * stalled));

        Assert.That(step.Items, Is.InRange(1, step.Plan.Backward.Length - 1));
        Assert.That(step.Items == 1 || step.Took <= step.Plan.Budget, Is.True);
    }

    // The longest stall for which the step leaves nothing out.
    private static TimeSpan Most(StepPlan plan) => plan.Budget - plan.LatencyPredicted;

    // Runs to the end of the first step with several items, in whose first operation the machine stalls.
    private static (StepRecord Step, LatencyModel Model) StepWithStall(Workload workload, Func<StepPlan, TimeSpan> stall)
    {
        EngineSimulation? run = null;
        LatencyModel? model = null;
        using (run = new EngineSimulation(new Scenario { Workload = workload, Probe = OnOperation }, seed: 1))
        {
            run.Run(_ => model is not null);
            return (run.Steps[^1], model!.Value);
        }

        void OnOperation(string _)
        {
            bool isBegun = run?.Loop.LastPlan is { Backward.Length: > 2, Forward.IsEmpty: true } plan &&
                plan.Inference.IsEmpty == (workload == Workload.None);
            if (model is null && isBegun)
            {
                model = run!.Loop.Latency;
                run.Stall(stall(run.Loop.LastPlan!));
            }
        }
    }
}
