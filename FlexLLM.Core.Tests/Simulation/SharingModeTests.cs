using FlexLLM.Scheduling;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>Every sharing mode does what it says, on the engine's own loop.</summary>
[TestFixture]
[Parallelizable]
internal sealed class SharingModeTests
{
    private static readonly Workload Medium = new() { Requests = 60, RequestsPerSecond = 9.0 };

    [Test]
    public void Mode_Any_AnswersEveryRequest([Values(0, 1, 2, 3, 4)] int mode)
    {
        using EngineSimulation run = Run(Modes[mode]);

        Assert.That(run.Requests.All(r => r.IsDone && r.Sequence.Generated == r.Arrival.AnswerTokens), Is.True);
        Assert.That(run.Loop.Jobs.TokensTrained, mode == 0 ? Is.Zero : Is.GreaterThan(0));
    }

    [Test]
    public void Mode_InferenceOnly_IsIdleWithoutRequests()
    {
        using EngineSimulation run = Run(SharingPolicy.InferenceOnly);

        Assert.That(run.Steps.Any(s => s.Plan.HasFinetuning), Is.False);
        Assert.That(run.Loop.RunStep(), Is.False);
    }

    [Test]
    public void Mode_Temporal_TrainsAWholeSampleEveryNSteps()
    {
        using EngineSimulation run = Run(SharingPolicy.Temporal(16));
        StepRecord[] steps = [.. run.Steps];

        Assert.That(steps.All(s => !s.Plan.HasFinetuning || s.Plan.Inference.IsEmpty), Is.True, "requests stand still");
        int since = 0;
        int turns = 0;
        for (int i = 0; i < steps.Length; i++)
        {
            bool begins = !steps[i].Plan.Forward.IsEmpty && (i == 0 || steps[i - 1].Plan.Forward.IsEmpty);
            if (begins && since > 0) // Not in a pause between requests, where nobody waits.
            {
                turns++;
                Assert.That(since, Is.LessThanOrEqualTo(16));
            }

            since = steps[i].Plan.HasFinetuning ? 0 : since + 1;
            Assert.That(since, Is.LessThanOrEqualTo(16), "then it is finetuning's turn");
        }

        Assert.That(turns, Is.GreaterThan(5));
    }

    [Test]
    public void Mode_DynamicTemporal_TrainsOftenerThanItsBoundAndAttainsMore()
    {
        using EngineSimulation dynamic = Run(SharingPolicy.DynamicTemporal(512));
        using EngineSimulation rare = Run(SharingPolicy.Temporal(512));
        using EngineSimulation often = Run(SharingPolicy.Temporal(4));

        Assert.That(dynamic.Loop.Jobs.TokensTrained, Is.GreaterThan(rare.Loop.Jobs.TokensTrained));
        Assert.That(dynamic.Attained(r => r.MetTpot && r.MetTtft), Is.GreaterThan(often.Attained(r => r.MetTpot && r.MetTtft)));
    }

    [Test]
    public void Mode_FixedBudget_FillsItsTokensAndTakesWholeLayers()
    {
        using EngineSimulation run = Run(SharingPolicy.FixedBudget(2));
        StepPlan[] plans = [.. run.Steps.Select(s => s.Plan)];

        Assert.That(plans.Any(p => !p.Forward.IsEmpty && !p.Backward.IsEmpty), Is.False, "never both");
        Assert.That(plans.Where(p => !p.Backward.IsEmpty).All(p => p.Backward.DistinctBy(w => w.Layer).Count() == 2), Is.True);
        Assert.That(plans.All(p => p.Features.InferenceRows + p.Features.ForwardRows <= 512), Is.True);
        Assert.That(plans.Any(p => p.Features.InferenceRows + p.Features.ForwardRows == 512), Is.True);
    }

    [Test]
    public void Mode_CoServingWithAccumulation_TrainsMoreWithTwoSamplesInFlight()
    {
        using EngineSimulation one = Run(SharingPolicy.CoServing);
        using EngineSimulation two = Run(SharingPolicy.CoServing, accumulation: 8);

        TestContext.Out.WriteLine(
            $"{one.TokensTrainedPerSecond:F0} tokens/s with one sample in flight, {two.TokensTrainedPerSecond:F0} with two");
        Assert.That(one.Steps.Any(Mixes), Is.False);
        Assert.That(two.Steps.Count(Mixes), Is.GreaterThan(two.Steps.Count / 10));
        Assert.That(two.TokensTrainedPerSecond, Is.GreaterThan(one.TokensTrainedPerSecond));

        static bool Mixes(StepRecord step) => !step.Plan.Forward.IsEmpty && !step.Plan.Backward.IsEmpty;
    }

    private static readonly SharingPolicy[] Modes =
    [
        SharingPolicy.InferenceOnly, SharingPolicy.CoServing, SharingPolicy.Temporal(32), SharingPolicy.DynamicTemporal(),
        SharingPolicy.FixedBudget(1),
    ];

    private static EngineSimulation Run(SharingPolicy sharing, int accumulation = 1) =>
        new EngineSimulation(new Scenario { Workload = Medium, Sharing = sharing, GradientAccumulation = accumulation }, 1).RunRequests();
}
