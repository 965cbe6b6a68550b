using FlexLLM.Backends;
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
        // Which request a token is for, as the device sees it: greedy ones take the largest logit, those of top-k some of the largest.
        // What a caller's thread sees depends on when it runs.
        var order = new List<string>();
        var device = new ProbedDevice(name =>
        {
            if (name is nameof(IComputeBackend.ArgMax) or nameof(IComputeBackend.Largest))
            {
                order.Add(name);
            }
        });
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { SequencesMax = 1 }, device);
        Task[] answers;
        using (HeldLoop.Of(engine))
        {
            answers =
            [
                engine.CompleteAsync(Asking(RequestClass.Interactive, new SamplingOptions { Temperature = 1, TopK = 20 })),
                engine.CompleteAsync(Asking(RequestClass.Batch, SamplingOptions.Greedy)),
                engine.CompleteAsync(Asking(RequestClass.Interactive, new SamplingOptions { Temperature = 1, TopK = 20 })),
            ];
        }

        await Task.WhenAll(answers).Soon();
        string[] expected =
        [
            .. Enumerable.Repeat(nameof(IComputeBackend.Largest), 8), .. Enumerable.Repeat(nameof(IComputeBackend.ArgMax), 4),
        ];
        Assert.That(order, Is.EqualTo(expected), "batch begins when both others have ended, though it came second");

        static GenerationRequest Asking(RequestClass requestClass, SamplingOptions sampling) =>
            new(TinyModel.Ids(5, 1)) { MaxTokens = 4, IgnoreEos = true, Class = requestClass, Sampling = sampling };
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
