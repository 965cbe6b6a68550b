using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>Law 2a: a request gives the same bits alone, batched, in chunks, after a preemption and next to finetuning.</summary>
[DeviceFixture(ModelArchitecture.Llama)]
[DeviceFixture(ModelArchitecture.Qwen2)]
[DeviceFixture(ModelArchitecture.Qwen3)]
internal sealed class BatchInvarianceTests(ModelArchitecture architecture)
{
    private TinyModel _model = null!;
    private GenerationRequest[] _requests = null!;
    private GenerationRequest[] _long = null!;
    private string[] _alone = null!;
    private string[] _longAlone = null!;

    [OneTimeSetUp]
    public async Task SetUp()
    {
        _model = new TinyModel(architecture);
        _model.WriteAdapter(
            "a", new LoraConfig { Rank = 3, Alpha = 6, TargetModules = ["q_proj", "k_proj", "down_proj"] }, seed: 1);
        _requests = Answers.Mixed(9, maxTokens: 20, null, "a");
        _long = Answers.Mixed(3, maxTokens: 100, null, "a");
        await using CoServingEngine engine = await StartAsync(new CoServingOptions());
        _alone = await engine.AskAloneAsync(_requests);
        _longAlone = await engine.AskAloneAsync(_long);
    }

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Answers_Together_SameBits([Values(1, 2, 3)] int threads)
    {
        await using CoServingEngine engine = await StartAsync(new CoServingOptions(), threads);
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(_alone));
    }

    [Test]
    public async Task Answers_PromptsInChunks_SameBits([Values(3, 17)] int tokensPerStep)
    {
        await using CoServingEngine engine = await StartAsync(
            new CoServingOptions { TokensPerStepMax = tokensPerStep, SequencesMax = 3 }, 2);
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(_alone));
    }

    [Test]
    public async Task Answers_PreemptedAndComputedAgain_SameBits()
    {
        await using CoServingEngine engine = await StartAsync(new CoServingOptions { KvCacheTokens = 160 }, 2);
        Assert.That(await engine.AskTogetherAsync(_long), Is.EqualTo(_longAlone));
        EngineStatistics statistics = await engine.GetStatisticsAsync().Soon();
        Assert.That(statistics.Preemptions, Is.Positive, "the cache is too large for this test");
        Assert.That(statistics.KvBlocksHeld, Is.Zero);
    }

    [Test]
    public async Task Answers_NextToFinetuning_SameBits([Values(1, 2)] int threads)
    {
        await using CoServingEngine engine = await StartAsync(
            new CoServingOptions { TokensPerStepMax = 24, SequencesMax = 24 }, threads);
        FinetuningJob job = await engine.StartFinetuningAsync(
            Jobs.Request("b") with { Epochs = 10_000, PublishEverySteps = 1 }).Soon();
        string[] together = await engine.AskTogetherAsync(_requests);
        await FirstStepAsync(job);
        string[] alone = await engine.AskAloneAsync(_requests);
        Assert.That(together, Is.EqualTo(_alone));
        Assert.That(alone, Is.EqualTo(_alone));
        Assert.That(job.Latest.Status, Is.EqualTo(FinetuningStatus.Running), "the job was to last longer than the requests");
    }

    private static async Task FirstStepAsync(FinetuningJob job)
    {
        using var timeout = new CancellationTokenSource(Waiting.TimeoutMax);
        await foreach (FinetuningProgress progress in job.Progress(timeout.Token))
        {
            if (progress.Step > 0)
            {
                break;
            }
        }
    }

    private async Task<CoServingEngine> StartAsync(CoServingOptions options, int threads = 1)
    {
        CoServingEngine engine = await _model.StartAsync(options, TestDevice.Of(threads));
        await engine.Adapters.LoadAsync("a", _model["a"]).Soon();
        return engine;
    }
}

/// <summary>The comparison above sees the smallest difference there is.</summary>
[DeviceFixture]
internal sealed class AnswersControlTests
{
    [Test]
    [ManagedOnly("a bit counts")]
    public void Of_LogProbOneUlpOff_Differs()
    {
        var token = new GeneratedToken { TokenId = 3, Text = "x", LogProb = -1.25f, TopLogProbs = [new TokenLogProb(3, -1.25f)] };
        var alternative = new TokenLogProb(3, MathF.BitIncrement(-1.25f));
        Assert.That(Answers.Of(token with { LogProb = MathF.BitIncrement(-1.25f) }), Is.Not.EqualTo(Answers.Of(token)));
        Assert.That(Answers.Of(token with { TopLogProbs = [alternative] }), Is.Not.EqualTo(Answers.Of(token)));
        Assert.That(Answers.Of(token with { Text = "y" }), Is.Not.EqualTo(Answers.Of(token)));
    }

    /// <summary>One row of one weight, off by one unit in the last place, changes what requests answer.</summary>
    [Test]
    [ManagedOnly("a bit counts")]
    public async Task Ask_WeightsOneUlpOff_Differs()
    {
        using var model = new TinyModel(ModelArchitecture.Llama);
        GenerationRequest[] requests = Answers.Mixed(4, maxTokens: 12);
        string[] before;
        await using (CoServingEngine engine = await model.StartAsync())
        {
            before = await engine.AskAloneAsync(requests);
        }

        Weights.Change(
            Path.Combine(model.Folder, "model.safetensors"), "model.layers.0.self_attn.v_proj.weight", MathF.BitIncrement);
        await using CoServingEngine changed = await model.StartAsync();
        Assert.That(await changed.AskAloneAsync(requests), Is.Not.EqualTo(before));
    }
}
