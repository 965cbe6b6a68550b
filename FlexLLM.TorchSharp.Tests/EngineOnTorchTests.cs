using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>The engine on libtorch: one option, the same answers, and finetuning beside them.</summary>
[TorchFixture]
internal sealed class EngineOnTorchTests
{
    private string _folder = null!;

    [OneTimeSetUp]
    public void MakeModel()
    {
        _folder = Directory.CreateTempSubdirectory("flexllm-torch-").FullName;
        var config = new ModelConfig
        {
            Architecture = ModelArchitecture.Qwen2,
            HiddenSize = 32,
            IntermediateSize = 48,
            LayerCount = 2,
            AttentionHeads = 4,
            KeyValueHeads = 2,
            HeadDim = 8,
            VocabularySize = 64,
            MaxPositions = 128,
        };
        RandomCheckpoint.Write(_folder, config, DType.BF16, seed: 3);
    }

    [OneTimeTearDown]
    public void RemoveModel() => Directory.Delete(_folder, recursive: true);

    [Test]
    public async Task CompleteAsync_GreedyRequestsBesideEachOther_AnswerAsOnTheCpuBackend()
    {
        List<IReadOnlyList<int>> expected = await AnswersAsync(ComputeDevice.Cpu(1));
        List<IReadOnlyList<int>> actual = await AnswersAsync(TorchBackend.Create("cpu"));
        Assert.That(actual, Is.EqualTo(expected));
        Assert.That(expected.Distinct().Count(), Is.GreaterThan(1), "Control: answers differ.");
    }

    private async Task<List<IReadOnlyList<int>>> AnswersAsync(ComputeDevice device)
    {
        var options = new CoServingOptions { Device = device, ProfilingTimeMax = TimeSpan.Zero };
        await using CoServingEngine engine = await CoServingEngine.LoadAsync(_folder, options);
        Task<GenerationResult>[] answers =
        [
            .. Enumerable.Range(1, 5).Select(i => engine.CompleteAsync(new GenerationRequest([i, 2 * i, 7])
            {
                MaxTokens = 20,
                IgnoreEos = true,
                Sampling = SamplingOptions.Greedy,
            })),
        ];
        return [.. (await Task.WhenAll(answers)).Select(answer => answer.Tokens)];
    }
}
