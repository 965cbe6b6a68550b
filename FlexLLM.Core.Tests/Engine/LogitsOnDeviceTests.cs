using FlexLLM.Backends;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>Which requests' logits leave the device: those alone that need more of them than the largest.</summary>
[TestFixture]
internal sealed class LogitsOnDeviceTests
{
    private static readonly SamplingOptions TopK = new() { Temperature = 0.9f, TopK = 20, TopP = 0.95f, Seed = 3 };

    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Llama);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Answers_GreedyAndTopK_NoRowIsDownloaded()
    {
        (int[][] tokens, int downloads) = await AnswerAsync(SamplingOptions.Greedy, TopK, TopK with { TopK = 3, Seed = 4 });

        Assert.That(tokens.Select(t => t.Length), Is.All.EqualTo(12));
        Assert.That(downloads, Is.Zero);
    }

    /// <summary>Log probabilities want the whole row, and change no token.</summary>
    [Test]
    public async Task Answers_TopKBesideOthers_AreThoseOfTheWholeRow()
    {
        (int[][] mixed, int someDownloads) = await AnswerAsync(TopK, SamplingOptions.Greedy, TopK with { TopK = 0, Seed = 5 });
        (int[][] whole, int allDownloads) = await AnswerAsync(
            TopK with { LogProbs = 0 }, SamplingOptions.Greedy with { LogProbs = 0 }, TopK with { TopK = 0, Seed = 5, LogProbs = 0 });

        Assert.That(mixed, Is.EqualTo(whole));
        Assert.That(someDownloads, Is.EqualTo(12), "of the third request alone");
        Assert.That(allDownloads, Is.EqualTo(36));
    }

    private async Task<(int[][] Tokens, int Downloads)> AnswerAsync(params SamplingOptions[] sampling)
    {
        int downloads = 0;
        var device = new ProbedDevice(name => downloads += name == nameof(IComputeBackend.Download) ? 1 : 0);
        await using CoServingEngine engine = await _model.StartAsync(device: device).Soon();
        Task<GenerationResult>[] answers =
        [
            .. sampling.Select(s => engine.CompleteAsync(
                new GenerationRequest(TinyModel.Ids(9, 1)) { MaxTokens = 12, IgnoreEos = true, Sampling = s })),
        ];
        GenerationResult[] results = await Task.WhenAll(answers).Soon();
        return ([.. results.Select(r => r.Tokens.ToArray())], downloads);
    }
}
