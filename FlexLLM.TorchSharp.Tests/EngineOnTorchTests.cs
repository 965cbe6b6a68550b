using System.Globalization;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>The engine on libtorch: one option, the same answers, and finetuning beside them.</summary>
[TorchFixture]
internal sealed class EngineOnTorchTests
{
    // Of a block of F32: keys and values of 16 positions, 2 layers, 2 heads of 8.
    private const long BlockBytes = 2 * 16 * 2 * 2 * 8 * sizeof(float);

    // Relative, after 120 steps; measured: 0.5 to 1.2 %, by what ran beside.
    private const double Bf16CacheLoss = 2e-2;

    // The same; measured: 0.4 %.
    private const double Bf16ActivationsLoss = 2e-2;

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
    public async Task StartFinetuningAsync_OnABf16Cache_LearnsBesideAnAnswerInHalfTheBytes()
    {
        ComputeDevice device = TorchBackend.Create("cpu", new TorchOptions { Bf16KvCache = true });
        await LearnsNearlyAsF32Async(device, Bf16CacheLoss);

        EngineStatistics wide = await LoadedAsync(TorchBackend.Create("cpu"), null);
        EngineStatistics narrow = await LoadedAsync(device, null);
        Assert.That(narrow.KvBlocksTotal, Is.EqualTo(wide.KvBlocksTotal));
        Assert.That(wide.DeviceBytes - narrow.DeviceBytes, Is.EqualTo(wide.KvBlocksTotal * BlockBytes / 2));
    }

    [Test]
    public Task StartFinetuningAsync_OnBf16Activations_LearnsBesideAnAnswer() =>
        LearnsNearlyAsF32Async(TorchBackend.Create("cpu", new TorchOptions { Bf16Activations = true }), Bf16ActivationsLoss);

    // What a job keeps with all computed again that can be: half of what it is on F32, but for the log-sum-exp, which stays F32.
    [Test]
    public async Task StartFinetuningAsync_OnBf16Activations_FitsIntoSavedBytesThatRefuseF32()
    {
        ComputeDevice narrow = TorchBackend.Create("cpu", new TorchOptions { Bf16Activations = true });
        long wideLeast = await SavedLeastAsync(TorchBackend.Create("cpu"));
        long narrowLeast = await SavedLeastAsync(narrow);
        Assert.That(narrowLeast, Is.InRange(wideLeast / 2, (wideLeast * 3 / 4) - 1));
        Assert.That(await RefusalAsync(narrow, narrowLeast), Is.Null);
        Assert.That(await RefusalAsync(narrow, narrowLeast - 1), Does.Contain($"least {narrowLeast} bytes"));
        Assert.That(await RefusalAsync(TorchBackend.Create("cpu"), narrowLeast), Does.Contain($"least {wideLeast} bytes"));

        async Task<long> SavedLeastAsync(ComputeDevice device)
        {
            string text = (await RefusalAsync(device, 1))!;
            return long.Parse(text.Split("least ")[1].Split(' ')[0], CultureInfo.InvariantCulture);
        }
    }

    [Test]
    public async Task LoadAsync_BF16CacheWithinTheSameMemory_HoldsTwiceTheTokens()
    {
        long bytesMax = (await LoadedAsync(TorchBackend.Create("cpu"), null)).DeviceBytes + (50 * BlockBytes);
        EngineStatistics wide = await LoadedAsync(TorchBackend.Create("cpu"), bytesMax);
        EngineStatistics narrow = await LoadedAsync(TorchBackend.Create("cpu", new TorchOptions { Bf16KvCache = true }), bytesMax);
        Assert.That(narrow.KvBlocksTotal, Is.EqualTo(2 * wide.KvBlocksTotal).Or.EqualTo((2 * wide.KvBlocksTotal) + 1));
    }

    [Test]
    public async Task CompleteAsync_ThousandSteps_HoldNoMoreTensors([Values] bool bf16)
    {
        var options = new CoServingOptions
        {
            Device = TorchBackend.Create("cpu", new TorchOptions { Bf16Activations = bf16, Bf16KvCache = bf16 }),
            ProfilingTimeMax = TimeSpan.Zero,
        };
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

    // What an engine holds, with a small cache or with one that takes what it may.
    private async Task<EngineStatistics> LoadedAsync(ComputeDevice device, long? bytesMax)
    {
        var options = new CoServingOptions
        {
            Device = device,
            ProfilingTimeMax = TimeSpan.Zero,
            DeviceBytesMax = bytesMax,
            KvCacheTokens = bytesMax is null ? 1024 : 1 << 20,
        };
        await using CoServingEngine engine = await CoServingEngine.LoadAsync(_folder, options);
        return await engine.GetStatisticsAsync();
    }

    private async Task LearnsNearlyAsF32Async(ComputeDevice device, double bound)
    {
        double expected = await TrainedLossAsync(TorchBackend.Create("cpu"), epochs: 40, rate: 0.05f);
        double actual = await TrainedLossAsync(device, epochs: 40, rate: 0.05f);
        TestContext.Out.WriteLine($"loss {actual} for {expected}");
        Assert.That(actual, Is.EqualTo(expected).Within(bound * expected).And.Not.EqualTo(expected));
        Assert.That(actual, Is.LessThan(0.95 * Math.Log(64)), "It learned: of guessing it would be the whole.");
    }

    // Why a job that may save so much is refused; null where it runs to its end.
    private async Task<string?> RefusalAsync(ComputeDevice device, long savedBytesMax)
    {
        await using CoServingEngine engine = await CoServingEngine.LoadAsync(
            _folder, new CoServingOptions { Device = device, ProfilingTimeMax = TimeSpan.Zero });
        try
        {
            FinetuningJob job = await engine.StartFinetuningAsync(
                TinyCheckpoint.Job("a") with { Epochs = 1, SavedBytesMax = savedBytesMax });
            await job.Completion;
            return null;
        }
        catch (RequestRejectedException e)
        {
            return e.Message;
        }
    }

    private async Task<double> TrainedLossAsync(ComputeDevice device, int epochs = 4, float rate = 1e-2f)
    {
        var options = new CoServingOptions { Device = device, ProfilingTimeMax = TimeSpan.Zero };
        await using CoServingEngine engine = await CoServingEngine.LoadAsync(_folder, options);
        FinetuningJob job = await engine.StartFinetuningAsync(
            TinyCheckpoint.Job("a") with { Epochs = epochs, Optimizer = new AdamWOptions { LearningRate = rate } });
        Task<GenerationResult> answer = engine.CompleteAsync(
            new GenerationRequest([1, 2, 3]) { MaxTokens = 30, IgnoreEos = true, Sampling = SamplingOptions.Greedy });
        FinetuningProgress end = await job.Completion;
        Assert.That((await answer).Tokens, Has.Count.EqualTo(30));
        Assert.That(end.Step, Is.EqualTo(3 * epochs));
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
