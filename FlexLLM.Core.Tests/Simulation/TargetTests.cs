using FlexLLM.Engine;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>Latency targets against what was measured at load, on a machine whose times are known: a token takes 13 ms.</summary>
[TestFixture]
[Parallelizable]
internal sealed class TargetTests
{
    private static readonly ServiceLevelObjective Possible = new()
    {
        TimePerOutputToken = TimeSpan.FromMilliseconds(50),
        TimeToFirstToken = TimeSpan.FromMilliseconds(60),
    };

    private static Scenario Strict(ServiceLevelObjective slo) => new()
    {
        Workload = Workload.None,
        Jobs = 0,
        Slo = slo,
        Unattainable = UnattainableSlo.Refuse,
    };

    [TestCase(nameof(ServiceLevelObjective.TimePerOutputToken), 5, 1000, null)]
    [TestCase(nameof(ServiceLevelObjective.TimeToFirstToken), 50, 5, null)]
    [TestCase(nameof(ServiceLevelObjective.InterTokenLatency), 50, 1000, 5)]
    public void Load_TargetBelowOneToken_IsRefusedOrWarnsByOption(string name, int tpotMs, int ttftMs, int? interTokenMs)
    {
        var slo = new ServiceLevelObjective
        {
            TimePerOutputToken = TimeSpan.FromMilliseconds(tpotMs),
            TimeToFirstToken = TimeSpan.FromMilliseconds(ttftMs),
            InterTokenLatency = interTokenMs is int ms ? TimeSpan.FromMilliseconds(ms) : null,
        };
        using (var run = new EngineSimulation(Strict(slo), seed: 1))
        {
            Assert.That(
                run.Loop.CheckTargets,
                Throws.TypeOf<RequestRejectedException>()
                    .With.Message.Match($"Slo: {name} is 5 ms, but .* at least 1[0-9.]+ ms .*measured"));
        }

        var log = new WarningLog();
        using var warned = new EngineSimulation(Strict(slo) with { Unattainable = UnattainableSlo.Warn, Logger = log }, seed: 1);
        warned.Loop.CheckTargets();
        Assert.That(log.Warnings, Has.Count.EqualTo(1).And.One.Contains(name));
    }

    [Test]
    public void Submit_PromptLongerThanItsTtft_IsRefusedUnlessTheCacheHasIt()
    {
        using var run = new EngineSimulation(Strict(Possible), seed: 1);
        run.Loop.CheckTargets();
        int[] longPrompt = [.. Enumerable.Range(0, 1000).Select(i => i * 7 % 1000)];

        Task<InferenceSequence> refused = run.Send(longPrompt, answerTokens: 1).Submitted;
        run.Run();
        Assert.That(
            refused.Exception?.InnerException,
            Is.TypeOf<RequestRejectedException>().With.Message.Match("TimeToFirstToken is 60 ms, but .* 1000 .* at least 95.* ms"));

        for (int tokens = 300; tokens <= 900; tokens += 300)
        {
            Assert.That(Answered(longPrompt[..tokens]), Is.True, "each has 300 tokens that the cache has not");
        }

        Assert.That(Answered(longPrompt), Is.True);

        bool Answered(int[] prompt)
        {
            Task<InferenceSequence> submitted = run.Send(prompt, answerTokens: 1).Submitted;
            run.Run();
            return submitted.IsCompletedSuccessfully && submitted.Result.Generated == 1;
        }
    }

    [Test]
    public void Submit_PromptLongerThanTheEnginesTtft_IsServedWithoutAWarningWhereOptionsSaySo()
    {
        var log = new WarningLog();
        using var run = new EngineSimulation(Strict(Possible) with { Unattainable = UnattainableSlo.Warn, Logger = log }, seed: 1);
        run.Loop.CheckTargets();
        Task<InferenceSequence> submitted = run.Send(new int[1000], answerTokens: 1).Submitted;
        run.Run();
        Assert.That((submitted.Result.Generated, log.Warnings.Count), Is.EqualTo((1, 0)));
    }
}
