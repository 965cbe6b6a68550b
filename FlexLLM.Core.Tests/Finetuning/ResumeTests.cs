using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>
/// A job that was stopped and resumed from its checkpoint, in another engine, ends with the bits of an uninterrupted one.
/// </summary>
[DeviceFixture]
internal sealed class ResumeTests
{
    private TinyModel _model = null!;

    private static IEnumerable<TestCaseData> Optimizers()
    {
        yield return new TestCaseData(new AdamWOptions { LearningRate = 1e-2f, WeightDecay = 0.02f }).SetArgDisplayNames("AdamW");
        yield return new TestCaseData(
            new SgdOptions { LearningRate = 0.05f, Momentum = 0.9f, Nesterov = true }).SetArgDisplayNames("SGD with momentum");
        yield return new TestCaseData(new SgdOptions { LearningRate = 0.05f }).SetArgDisplayNames("SGD");
    }

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Qwen3);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    // The gate stands in the first loss after so many: inside the first group, at a group's start, in the second epoch.
    [TestCaseSource(nameof(Optimizers))]
    public async Task Resume_FromAnyStep_EqualsUninterrupted(OptimizerOptions optimizer)
    {
        FinetuningRequest request = Jobs.Request("j") with { Optimizer = optimizer };
        byte[] expected = await TrainWholeAsync(request);
        foreach (int sample in (int[])[1, 5, 9, 13])
        {
            string checkpoint = _model[$"checkpoint {optimizer.GetType().Name} {sample}"];
            int step = await StopAtAsync(request, sample, checkpoint);
            await using CoServingEngine engine = await _model.StartAsync(
                new CoServingOptions { TokensPerStepMax = 9, SequencesMax = 9 });
            FinetuningJob job = await engine.StartFinetuningAsync(request with { ResumeFrom = checkpoint }).Soon();
            FinetuningProgress end = await job.Completion.Soon();
            Assert.That(end.Step, Is.EqualTo(6));
            Assert.That(step, Is.InRange(0, 5));
            Assert.That(await Jobs.WeightsAsync(engine, "j", _model["saved"]), Jobs.SameAs(expected),
                $"stopped in sample {sample}, after step {step}");
        }
    }

    [Test]
    public async Task Resume_BeforeItsFirstStep_ReportsNoLoss()
    {
        string checkpoint = _model["checkpoint for reports"];
        int step = await StopAtAsync(Jobs.Request("j"), 9, checkpoint);
        Assert.That(step, Is.Positive);
        using var gate = new StepGate("FusedLinearCrossEntropy", 1);
        await using CoServingEngine engine = await _model.StartAsync(device: gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { ResumeFrom = checkpoint }).Soon();
        FinetuningProgress first = job.Latest;
        gate.Open();
        Assert.That(first.Step, Is.EqualTo(step));
        Assert.That(first.Loss, Is.NaN);
        await job.Completion.Soon();
    }

    [Test]
    public async Task Resume_OfAnotherRequest_NamesTheFile()
    {
        string checkpoint = _model["checkpoint of another"];
        await StopAtAsync(Jobs.Request("j"), 5, checkpoint);
        await using CoServingEngine engine = await _model.StartAsync();
        foreach (FinetuningRequest other in (FinetuningRequest[])[
            Jobs.Request("j") with { Epochs = 3 },
            Jobs.Request("j") with { GradientAccumulation = 2 },
            Jobs.Request("j") with { ShuffleSeed = null },
            Jobs.Request("j") with { Optimizer = new AdamWOptions { LearningRate = 2e-2f } },
            Jobs.Request("j") with { Method = new LoraConfig { Rank = 5 } },
            Jobs.Request("j") with { Dataset = Jobs.Dataset(1, 4, 5) }])
        {
            Exception? fault = await engine.StartFinetuningAsync(other with { ResumeFrom = checkpoint }).FaultAsync();
            Assert.That(fault, Is.InstanceOf<FlexLlmException>(), other.ToString());
        }

        Assert.That(await engine.Adapters.ListAsync().Soon(), Is.Empty);
        string state = Path.Combine(checkpoint, "optimizer.safetensors");
        File.WriteAllBytes(state, File.ReadAllBytes(state).AsSpan()[..200]);
        Exception? broken = await engine.StartFinetuningAsync(Jobs.Request("j") with { ResumeFrom = checkpoint }).FaultAsync();
        Assert.That(broken, Is.InstanceOf<InvalidFileException>().With.Property("File").EqualTo(state));
        File.Delete(state);
        Exception? missing = await engine.StartFinetuningAsync(Jobs.Request("j") with { ResumeFrom = checkpoint }).FaultAsync();
        Assert.That(missing, Is.InstanceOf<InvalidFileException>().With.Property("File").EqualTo(state));
    }

    private async Task<byte[]> TrainWholeAsync(FinetuningRequest request)
    {
        await using CoServingEngine engine = await _model.StartAsync();
        await engine.TrainAsync(request);
        return await Jobs.WeightsAsync(engine, "j", _model["whole"]);
    }

    /// <summary>
    /// Saves a checkpoint in the given sample's forward pass and takes the engine down. Returns the steps done.
    /// </summary>
    private async Task<int> StopAtAsync(FinetuningRequest request, int sample, string checkpoint)
    {
        using var gate = new StepGate("FusedLinearCrossEntropy", sample);
        await using CoServingEngine engine = await _model.StartAsync(device: gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(request).Soon();
        await gate.ReachedAsync();
        int step = job.Latest.Step;
        Task saved = job.SaveCheckpointAsync(checkpoint);
        gate.Open();
        await saved.Soon();
        await engine.DisposeAsync().Soon();
        Assert.That(job.Completion.IsCanceled || job.Completion.IsCompletedSuccessfully);
        return step;
    }
}
