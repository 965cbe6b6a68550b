using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>What a request's class and its targets of its own mean through the public engine.</summary>
[DeviceFixture]
internal sealed class RequestClassTests
{
    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Llama);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Classes_OnePlace_InteractiveGoesFirst()
    {
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { SequencesMax = 1 });
        bool allWaited = false;
        for (int attempt = 0; attempt < 50 && !allWaited; attempt++)
        {
            // On a busy machine the first may have ended before the third is there; then it says nothing.
            long before = (await engine.GetStatisticsAsync()).RequestsFinished;
            Task running = engine.CompleteAsync(Asking(RequestClass.Interactive, tokens: 200));
            Task<long> batch = FinishedAtFirstTokenAsync(Asking(RequestClass.Batch, tokens: 200));
            Task interactive = engine.CompleteAsync(Asking(RequestClass.Interactive, tokens: 4));
            allWaited = (await engine.GetStatisticsAsync()).RequestsFinished == before;
            await Task.WhenAll(running, batch, interactive).Soon();
            if (allWaited)
            {
                Assert.That(await batch - before, Is.EqualTo(2), "batch begins when both others have ended, though it came second");
            }
        }

        Assert.That(allWaited, Is.True, "three requests were there at once");

        static GenerationRequest Asking(RequestClass requestClass, int tokens) =>
            new(TinyModel.Ids(5, 1)) { MaxTokens = tokens, IgnoreEos = true, Class = requestClass };

        // The engine's own count: whose caller hears of its end first depends on the thread pool.
        async Task<long> FinishedAtFirstTokenAsync(GenerationRequest request)
        {
            long? finished = null;
            await foreach (GeneratedToken token in engine.GenerateAsync(request))
            {
                finished ??= (await engine.GetStatisticsAsync()).RequestsFinished;
            }

            return finished ?? -1;
        }
    }

    [Test]
    public async Task Attained_InterTokenTarget_CountsLateTokens()
    {
        var loose = new ServiceLevelObjective
        {
            TimePerOutputToken = TimeSpan.FromMinutes(1),
            TimeToFirstToken = TimeSpan.FromMinutes(1),
            InterTokenLatency = TimeSpan.FromMinutes(1),
        };
        GenerationRequest request = new(TinyModel.Ids(5, 1)) { MaxTokens = 9, IgnoreEos = true, Slo = loose };
        await using CoServingEngine engine = await _model.StartAsync();
        await engine.CompleteAsync(request).Soon();
        await engine.CompleteAsync(request with { Slo = loose with { InterTokenLatency = TimeSpan.FromTicks(1) } }).Soon();

        EngineStatistics statistics = await engine.GetStatisticsAsync().Soon();
        Assert.That((statistics.RequestsFinished, statistics.RequestsAttained), Is.EqualTo((2, 1)));
    }

    [Test]
    public async Task Slo_BelowOneToken_IsWarnedOfByName()
    {
        var log = new WarningLog();
        var impossible = new ServiceLevelObjective { InterTokenLatency = TimeSpan.FromTicks(1) };
        await using CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { BatchSlo = impossible, Logger = log, ProfilingTimeMax = TinyModel.ProfilingTime });
        GenerationRequest request = new(TinyModel.Ids(5, 1)) { MaxTokens = 2, IgnoreEos = true, Slo = impossible };
        await engine.CompleteAsync(request).Soon();

        Assert.That(log.Warnings, Has.Count.EqualTo(2));
        Assert.That(log.Warnings[0], Does.StartWith("BatchSlo: InterTokenLatency is 0.0001 ms").And.Contains("measured at load"));
        Assert.That(log.Warnings[1], Does.StartWith("The request's Slo: InterTokenLatency"));
    }
}
