using FlexLLM.Scheduling;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>Which answers tell the engine how much finetuning has to leave to requests.</summary>
[TestFixture]
[Parallelizable]
internal sealed class SlackLearningTests
{
    private static readonly Scenario Light = new()
    {
        Workload = new Workload { Requests = 60, RequestsPerSecond = 2.0, PromptMean = 64, AnswerMean = 32 },
    };

    [Test]
    public void Answers_InTimeThoughFinetuningSpentTheirSlack_LowerTheCaution() =>
        Assert.That(CautionAfter(TimeSpan.FromMilliseconds(50), jobs: 1), Is.LessThan(0.5 * SlackReserve.Initial.Caution));

    [Test]
    public void Answers_WithTargetsThatNothingCouldMiss_TellNothing() =>
        Assert.That(CautionAfter(TimeSpan.FromSeconds(10), jobs: 1), Is.EqualTo(SlackReserve.Initial.Caution));

    [Test]
    public void Answers_WithoutAJob_TellNothing() =>
        Assert.That(CautionAfter(TimeSpan.FromMilliseconds(15), jobs: 0), Is.EqualTo(SlackReserve.Initial.Caution));

    private static double CautionAfter(TimeSpan tpot, int jobs)
    {
        using var run = new EngineSimulation(
            Light with { Jobs = jobs, Slo = new ServiceLevelObjective { TimePerOutputToken = tpot } }, seed: 1);
        run.RunRequests();
        return run.Loop.TakeSnapshot().Reserve.Caution;
    }
}
