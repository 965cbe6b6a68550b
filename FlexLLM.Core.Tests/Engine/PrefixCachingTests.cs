using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>Shared beginnings are computed once, and no answer can tell.</summary>
[DeviceFixture]
internal sealed class PrefixCachingTests
{
    private TinyModel _model = null!;
    private GenerationRequest[] _requests = null!;

    [OneTimeSetUp]
    public void SetUp()
    {
        _model = new TinyModel(ModelArchitecture.Qwen2);
        string[] modules = ["q_proj", "k_proj", "v_proj", "down_proj"];
        _model.WriteAdapter("a", new LoraConfig { Rank = 3, Alpha = 6, TargetModules = modules }, seed: 1);
        _model.WriteAdapter("b", new LoraConfig { Rank = 4, Alpha = 8, TargetModules = modules }, seed: 2);
        int[] beginning = TinyModel.Ids(70, 9);
        _requests =
        [
            .. Enumerable.Range(0, 8).Select(i => new GenerationRequest([.. beginning, .. TinyModel.Ids(1 + (9 * i), (ulong)i)])
            {
                MaxTokens = 30,
                IgnoreEos = true,
                Adapter = i % 3 == 2 ? "a" : null,
                Sampling = new SamplingOptions { Temperature = 0.9f, Seed = (ulong)i, LogProbs = 2 },
            }),
        ];
    }

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Answers_SharedBeginnings_SameBitsAsWithout([Values(256, 24)] int tokensPerStep)
    {
        CoServingOptions options = new() { TokensPerStepMax = tokensPerStep, SequencesMax = 6 };
        await using CoServingEngine off = await StartAsync(options with { PrefixCaching = false });
        string[] expected = await off.AskAloneAsync(_requests);
        await using CoServingEngine on = await StartAsync(options);

        Assert.That(await on.AskAloneAsync(_requests), Is.EqualTo(expected));
        long reused = (await on.GetStatisticsAsync().Soon()).TokensReused;
        Assert.That(reused, Is.EqualTo(6 * 64), "four whole blocks, by all but the first with and without the adapter");
        Assert.That(await on.AskTogetherAsync(_requests), Is.EqualTo(expected));
        EngineStatistics after = await on.GetStatisticsAsync().Soon();
        Assert.That(after.TokensReused - reused, Is.GreaterThanOrEqualTo(8 * 64));
        Assert.That(after.KvBlocksHeld, Is.Zero);
        Assert.That((await off.GetStatisticsAsync().Soon()).TokensReused, Is.Zero);
    }

    [Test]
    public async Task Answers_TooFewBlocksForAll_SameBitsAsWithout()
    {
        GenerationRequest[] longer = [.. _requests.Select(r => r with { MaxTokens = 100 })];
        await using CoServingEngine off = await StartAsync(new CoServingOptions { PrefixCaching = false });
        string[] expected = await off.AskAloneAsync(longer);
        await using CoServingEngine on = await StartAsync(new CoServingOptions { KvCacheTokens = 256 });

        for (int i = 0; i < 2; i++)
        {
            Assert.That(await on.AskTogetherAsync(longer), Is.EqualTo(expected));
        }

        Assert.That((await on.GetStatisticsAsync().Soon()).Preemptions, Is.Positive, "the cache is too large for this test");
    }

    [Test]
    public async Task Conversation_NextTurn_ComputesOnlyWhatIsNew()
    {
        await using CoServingEngine engine = await StartAsync(new CoServingOptions());
        GenerationRequest first = _requests[0] with { MaxTokens = 40 };
        GenerationResult answer = await engine.CompleteAsync(first).Soon();
        int[] turns = [.. first.PromptTokens!, .. answer.Tokens, .. TinyModel.Ids(9, 3)];

        await engine.CompleteAsync(new GenerationRequest(turns) { MaxTokens = 2, IgnoreEos = true }).Soon();

        // The last answered token was never an input, so the block that it would have filled is not full.
        int computed = first.PromptTokens!.Count + answer.Tokens.Count - 1;
        Assert.That((await engine.GetStatisticsAsync().Soon()).TokensReused, Is.EqualTo(computed / 16 * 16));
    }

    [Test]
    public async Task Adapter_LoadedAgainUnderItsName_SharesNothingWithTheOldOne()
    {
        GenerationRequest request = _requests[2];
        await using CoServingEngine fresh = await StartAsync(new CoServingOptions());
        await fresh.Adapters.UnloadAsync("a").Soon();
        await fresh.Adapters.LoadAsync("a", _model["b"]).Soon();
        string expected = await fresh.AskAsync(request);
        await using CoServingEngine engine = await StartAsync(new CoServingOptions());
        string old = await engine.AskAsync(request);
        await engine.Adapters.UnloadAsync("a").Soon();
        await engine.Adapters.LoadAsync("a", _model["b"]).Soon();

        Assert.That(await engine.AskAsync(request), Is.EqualTo(expected).And.Not.EqualTo(old));
        Assert.That((await engine.GetStatisticsAsync().Soon()).TokensReused, Is.Zero);
        Assert.That(await engine.AskAsync(request), Is.EqualTo(expected));
        Assert.That((await engine.GetStatisticsAsync().Soon()).TokensReused, Is.Positive);
    }

    private async Task<CoServingEngine> StartAsync(CoServingOptions options)
    {
        CoServingEngine engine = await _model.StartAsync(options, TestDevice.Of(1));
        await engine.Adapters.LoadAsync("a", _model["a"]).Soon();
        return engine;
    }
}
