using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>The engine on libtorch: one option, the same answers, and finetuning beside them.</summary>
[TorchFixture]
internal sealed class EngineOnTorchTests
{
    private string _folder = null!;

    [OneTimeSetUp]
    public void MakeModel() => _folder = TinyCheckpoint.Write(layers: 2);

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

    [Test]
    public async Task StartFinetuningAsync_BesideARequest_LearnsAsOnTheCpuBackend()
    {
        double expected = await TrainedLossAsync(ComputeDevice.Cpu(1));
        double actual = await TrainedLossAsync(TorchBackend.Create("cpu"));
        Assert.That(actual, Is.EqualTo(expected).Within(1e-3 * expected));
    }

    [Test]
    public async Task CompleteAsync_ThousandSteps_HoldNoMoreTensors()
    {
        var options = new CoServingOptions { Device = TorchBackend.Create("cpu"), ProfilingTimeMax = TimeSpan.Zero };
        await using CoServingEngine engine = await CoServingEngine.LoadAsync(_folder, options);
        GenerationRequest request = new([1, 2, 3]) { MaxTokens = 100, IgnoreEos = true };
        await engine.CompleteAsync(request);
        long before = TorchSharp.torch.Tensor.TotalCount;
        for (int i = 0; i < 10; i++)
        {
            await engine.CompleteAsync(request);
        }

        Assert.That(TorchSharp.torch.Tensor.TotalCount, Is.EqualTo(before));
    }

    private async Task<double> TrainedLossAsync(ComputeDevice device)
    {
        var options = new CoServingOptions { Device = device, ProfilingTimeMax = TimeSpan.Zero };
        await using CoServingEngine engine = await CoServingEngine.LoadAsync(_folder, options);
        FinetuningJob job = await engine.StartFinetuningAsync(TinyCheckpoint.Job("a"));
        Task<GenerationResult> answer = engine.CompleteAsync(new GenerationRequest([1, 2, 3]) { MaxTokens = 30, IgnoreEos = true });
        FinetuningProgress end = await job.Completion;
        Assert.That((await answer).Tokens, Has.Count.EqualTo(30));
        Assert.That(end.Step, Is.EqualTo(12));
        return end.Loss;
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
