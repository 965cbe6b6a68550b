using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>What a request may ask for, and how its answer ends.</summary>
[DeviceFixture]
internal sealed class GenerationTests
{
    private TinyModel _model = null!;
    private CoServingEngine _engine = null!;

    [OneTimeSetUp]
    public async Task SetUp()
    {
        _model = new TinyModel(ModelArchitecture.Llama, withTokenizer: true);
        _engine = await _model.StartAsync(new CoServingOptions { KvCacheTokens = 512 });
    }

    [OneTimeTearDown]
    public async Task TearDown()
    {
        await _engine.DisposeAsync().Soon();
        _model.Dispose();
    }

    [Test]
    public async Task Complete_TokenLimit_EndsWithLength()
    {
        GenerationResult result = await CompleteAsync(Prompt(3) with { MaxTokens = 5, IgnoreEos = true });
        Assert.That(result.Tokens, Has.Count.EqualTo(5));
        Assert.That(result.FinishReason, Is.EqualTo(FinishReason.Length));
    }

    [TestCase(250)]
    [TestCase(256)]
    [TestCase(int.MaxValue)]
    public async Task Complete_ContextEnd_EndsWithLength(int maxTokens)
    {
        GenerationResult result = await CompleteAsync(Prompt(200) with { MaxTokens = maxTokens, IgnoreEos = true });
        Assert.That(result.Tokens, Has.Count.EqualTo(56));
        Assert.That(result.FinishReason, Is.EqualTo(FinishReason.Length));
    }

    [TestCase(TinyModel.Eos)]
    [TestCase(258)] // The tokenizer's own <|im_end|>.
    public async Task Complete_EndToken_EndsWithStopUnlessIgnored(int eos)
    {
        GenerationRequest request = Prompt(4) with { MaxTokens = 6, Sampling = Only(eos) };
        GenerationResult stopped = await CompleteAsync(request);
        Assert.That(stopped.Tokens, Is.EqualTo(new[] { eos }));
        Assert.That(stopped.Text, Is.Empty);
        Assert.That(stopped.FinishReason, Is.EqualTo(FinishReason.Stop));
        GenerationResult ignored = await CompleteAsync(request with { IgnoreEos = true });
        Assert.That(ignored.Tokens, Has.Count.EqualTo(6));
        Assert.That(ignored.FinishReason, Is.EqualTo(FinishReason.Length));
    }

    [Test]
    public async Task Complete_TokenThatOnlyPadsTheHead_HasNoTextAndHarmsNobody()
    {
        GenerationResult result = await CompleteAsync(
            Prompt(4) with { MaxTokens = 3, Sampling = Only(TinyModel.TokenizerSize + 1) });
        Assert.That(result.Tokens, Is.EqualTo(new[] { 260, 260, 260 }));
        Assert.That(result.Text, Is.Empty);
        Assert.That((await CompleteAsync(Prompt(4) with { MaxTokens = 2 })).Tokens, Is.Not.Empty);
    }

    [Test]
    public async Task Complete_LogitBias_ForcesAndForbids()
    {
        GenerationResult forced = await CompleteAsync(Prompt(4) with { MaxTokens = 4, Sampling = Only('A') });
        Assert.That(forced.Text, Is.EqualTo("AAAA"));
        var forbidden = SamplingOptions.Greedy with { LogitBias = new Dictionary<int, float> { ['A'] = 100, ['B'] = 90 } };
        int[] first = [.. (await CompleteAsync(Prompt(4) with { MaxTokens = 1, Sampling = forbidden })).Tokens];
        var more = forbidden with { LogitBias = new Dictionary<int, float> { ['A'] = float.NegativeInfinity, ['B'] = 90 } };
        int[] second = [.. (await CompleteAsync(Prompt(4) with { MaxTokens = 1, Sampling = more })).Tokens];
        Assert.That((first[0], second[0]), Is.EqualTo(((int)'A', (int)'B')));
    }

    [Test]
    public async Task Complete_BiasForbidsEverything_EndsWithErrorAlone()
    {
        var nothing = SamplingOptions.Greedy with
        {
            LogitBias = Enumerable.Range(0, TinyModel.Vocabulary).ToDictionary(i => i, _ => float.NegativeInfinity),
        };
        GenerationResult result = await CompleteAsync(Prompt(4) with { Sampling = nothing });
        Assert.That(result.FinishReason, Is.EqualTo(FinishReason.Error));
        Assert.That(result.FinishDetail, Does.Contain("bias"));
        Assert.That(result.Tokens, Is.Empty);
        Assert.That((await CompleteAsync(Prompt(4) with { MaxTokens = 2, IgnoreEos = true })).Tokens, Has.Count.EqualTo(2));
    }

    [Test]
    public async Task Complete_StopSequence_IsCutOffTheText()
    {
        // Greedy with these biases says what the penalty lets it: A, then B, then C ...
        var alphabet = new SamplingOptions
        {
            Temperature = 0,
            RepetitionPenalty = 1000,
            LogitBias = Enumerable.Range(0, 8).ToDictionary(i => 'A' + i, i => 900f - (i * 50)),
        };
        GenerationRequest request = new([1, 2]) { MaxTokens = 8, Sampling = alphabet };
        GenerationResult whole = await CompleteAsync(request);
        Assert.That(whole.Text, Is.EqualTo("ABCDEFGH"));
        GenerationResult stopped = await CompleteAsync(request with { StopSequences = ["xyz", "DE"] });
        Assert.That(stopped.Text, Is.EqualTo("ABC"));
        Assert.That(stopped.FinishReason, Is.EqualTo(FinishReason.Stop));
        Assert.That(stopped.Tokens, Has.Count.EqualTo(5));
        GenerationResult held = await CompleteAsync(request with { MaxTokens = 4, StopSequences = ["CDE"] });
        Assert.That(held.Text, Is.EqualTo("ABCD"), "what was held back is given out at the end");
        Assert.That(held.FinishReason, Is.EqualTo(FinishReason.Length));
    }

    [Test]
    public async Task Complete_Seed_MakesAnswersRepeat()
    {
        GenerationRequest request = Prompt(5) with
        {
            MaxTokens = 24,
            IgnoreEos = true,
            Sampling = new SamplingOptions { Temperature = 1.2f, Seed = 3 },
        };
        string first = await _engine.AskAsync(request);
        await _engine.AskAsync(Prompt(7) with { MaxTokens = 3 });
        Assert.That(await _engine.AskAsync(request), Is.EqualTo(first));
        SamplingOptions other = request.Sampling with { Seed = 4 };
        Assert.That(await _engine.AskAsync(request with { Sampling = other }), Is.Not.EqualTo(first));
        SamplingOptions none = request.Sampling with { Seed = null };
        string[] unseeded = await _engine.AskAloneAsync([request with { Sampling = none }, request with { Sampling = none }]);
        Assert.That(unseeded[0], Is.Not.EqualTo(unseeded[1]));
    }

    [Test]
    public async Task Complete_TextPrompt_IsItsTokens()
    {
        GenerationResult text = await CompleteAsync(new GenerationRequest("Hello") { MaxTokens = 9, IgnoreEos = true });
        GenerationResult ids = await CompleteAsync(
            new GenerationRequest(_engine.Tokenizer!.Encode("Hello")) { MaxTokens = 9, IgnoreEos = true });
        Assert.That(text.Tokens, Is.EqualTo(ids.Tokens));
        Assert.That(text.Text,
            Is.EqualTo(_engine.Tokenizer.Decode([.. text.Tokens.Where(t => t < 259)], skipSpecialTokens: true)));
    }

    [Test]
    public async Task Complete_Messages_UseTheChatTemplate()
    {
        ChatMessage[] messages = [new ChatMessage("user", "Hi")];
        int[] ids = _engine.ChatTemplate!.Encode(_engine.Tokenizer!, messages, addGenerationPrompt: true).Ids;
        GenerationResult chat = await CompleteAsync(new GenerationRequest(messages) { MaxTokens = 6, IgnoreEos = true });
        Assert.That(chat.Tokens,
            Is.EqualTo((await CompleteAsync(new GenerationRequest(ids) { MaxTokens = 6, IgnoreEos = true })).Tokens));
    }

    private static IEnumerable<TestCaseData> Rejected()
    {
        yield return Case("no token", new GenerationRequest(Array.Empty<int>()), "no token");
        yield return Case("empty text", new GenerationRequest(string.Empty), "no token");
        yield return Case("id too large", new GenerationRequest([1, 300]), "300");
        yield return Case("negative id", new GenerationRequest([-1]), "-1");
        yield return Case("unknown adapter", new GenerationRequest([1]) { Adapter = "who" }, "who");
        yield return Case("too long", Prompt(256), "256");
        yield return Case("bias beyond the head", new GenerationRequest([1])
        {
            Sampling = new SamplingOptions { LogitBias = new Dictionary<int, float> { [300] = 1 } },
        }, "300");

        static TestCaseData Case(string name, GenerationRequest request, string word) =>
            new TestCaseData(request, word).SetArgDisplayNames(name);
    }

    [TestCaseSource(nameof(Rejected))]
    public async Task Complete_CannotBeServed_IsRejectedAtTheDoor(GenerationRequest request, string word)
    {
        Exception? fault = await _engine.CompleteAsync(request).FaultAsync();
        Assert.That(fault, Is.TypeOf<RequestRejectedException>().With.Message.Contains(word));
        Assert.That((await _engine.GetStatisticsAsync().Soon()).RequestsActive, Is.Zero);
    }

    [Test]
    public async Task Complete_ParametersOutOfRange_AreArgumentErrors()
    {
        foreach (GenerationRequest request in (GenerationRequest[])[
            Prompt(2) with { MaxTokens = 0 },
            Prompt(2) with { Sampling = new SamplingOptions { TopP = 2 } },
            Prompt(2) with { StopSequences = [string.Empty] },
            Prompt(2) with { Slo = new ServiceLevelObjective { TimePerOutputToken = TimeSpan.Zero } },
            new GenerationRequest([new ChatMessage(string.Empty, "x")])])
        {
            Assert.That(await _engine.CompleteAsync(request).FaultAsync(), Is.InstanceOf<ArgumentException>(),
                request.ToString());
        }
    }

    [Test]
    public async Task Complete_WithoutTokenizer_TakesIdsOnly()
    {
        using var bare = new TinyModel(ModelArchitecture.Qwen3);
        await using CoServingEngine engine = await bare.StartAsync();
        foreach (GenerationRequest request in (GenerationRequest[])[
            new GenerationRequest("text"),
            new GenerationRequest([new ChatMessage("user", "Hi")]),
            Prompt(3) with { StopSequences = ["x"] }])
        {
            Assert.That(await engine.CompleteAsync(request).FaultAsync(), Is.TypeOf<RequestRejectedException>());
        }

        GenerationResult ids = await engine.CompleteAsync(Prompt(3) with { MaxTokens = 4, IgnoreEos = true }).Soon();
        Assert.That(ids.Tokens, Has.Count.EqualTo(4));
        Assert.That(ids.Text, Is.Empty);
    }

    private static GenerationRequest Prompt(int tokens) => new(TinyModel.Ids(tokens, 77));

    private static SamplingOptions Only(int token) =>
        SamplingOptions.Greedy with { LogitBias = new Dictionary<int, float> { [token] = 1e6f } };

    private Task<GenerationResult> CompleteAsync(GenerationRequest request) => _engine.CompleteAsync(request).Soon();
}
