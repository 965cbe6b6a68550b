using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>
/// The time between any two tokens of an answer, at its 99th percentile, while prompts of others come and a job trains beside it.
/// </summary>
[TestFixture]
[Parallelizable]
internal sealed class InterTokenTests
{
    private const int AnswerTokens = 700;

    private static readonly Workload Others = new() { Requests = 90, RequestsPerSecond = 6.0, AnswerMean = 16 };

    // A decode step takes about 13 ms: below TPOT, and above it.
    private static IEnumerable<TestCaseData> Targets =>
        [new TestCaseData(50, 30).SetArgDisplayNames("belowTpot"), new TestCaseData(40, 60).SetArgDisplayNames("aboveTpot")];

    [TestCaseSource(nameof(Targets))]
    public void Answer_BesidePromptsAndFinetuning_KeepsItsInterTokenTarget(int tpotMs, int interTokenMs)
    {
        TimeSpan target = TimeSpan.FromMilliseconds(interTokenMs);
        var slo = new ServiceLevelObjective { TimePerOutputToken = TimeSpan.FromMilliseconds(tpotMs) };
        (TimeSpan[] with, EngineSimulation run) = GapsOf(slo with { InterTokenLatency = target });
        (TimeSpan[] without, EngineSimulation control) = GapsOf(slo);
        (_, EngineSimulation alone) = GapsOf(slo with { InterTokenLatency = target }, jobs: 0);
        using (run)
        using (control)
        using (alone)
        {
            TestContext.Out.WriteLine(
                $"p50 {P(with, 0.5)}, p99 {P(with, 0.99)}, longest {with[^1]}; without p99 {P(without, 0.99)}; trained " +
                $"{run.TokensTrainedPerSecond:F0} and {control.TokensTrainedPerSecond:F0} tokens/s; TTFT " +
                $"{run.Attained(r => r.MetTtft):P1}, without a job {alone.Attained(r => r.MetTtft):P1}; " +
                $"TPOT {run.Attained(r => r.MetTpot):P1} and {alone.Attained(r => r.MetTpot):P1}");
            Assert.That(P(with, 0.99), Is.LessThanOrEqualTo(target));
            Assert.That(P(without, 0.99), Is.GreaterThan(target), "the control");
            Assert.That(run.Requests[0].MetTpot, Is.True);
            Assert.That(run.TokensTrainedPerSecond, Is.GreaterThan(0.2 * control.TokensTrainedPerSecond), "finetuning goes on");
            Assert.That(run.Attained(r => r.MetTtft), Is.GreaterThanOrEqualTo(alone.Attained(r => r.MetTtft) - 0.02));
        }
    }

    private static (TimeSpan[] Gaps, EngineSimulation Run) GapsOf(ServiceLevelObjective slo, int jobs = 1)
    {
        var run = new EngineSimulation(new Scenario { Workload = Others, Jobs = jobs }, 1);
        SimulatedRequest answer = run.Ask(promptTokens: 64, AnswerTokens, slo);
        run.RunRequests();
        Assert.That(answer.TokenTimes, Has.Count.EqualTo(AnswerTokens));
        return ([.. answer.TokenTimes.Zip(answer.TokenTimes.Skip(1), (a, b) => b - a).Order()], run);
    }

    private static TimeSpan P(TimeSpan[] sorted, double share) => sorted[(int)Math.Ceiling(share * sorted.Length) - 1];
}
