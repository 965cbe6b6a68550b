using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>Jobs through the engine: what they learn, report and refuse.</summary>
[DeviceFixture]
internal sealed class JobTests
{
    private static readonly (string Prompt, string Answer)[] Pairs =
        [("sky:", "blue"), ("grass:", "green"), ("sun:", "yellow"), ("night:", "dark")];

    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Qwen3, withTokenizer: true);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Train_FourPairs_LearnsThemByHeart()
    {
        string path = _model["pairs.jsonl"];
        File.WriteAllLines(path, Pairs.Select(p => $$"""{"prompt": "{{p.Prompt}}", "completion": "{{p.Answer}}"}"""));
        using var gate = new StepGate("FusedLinearCrossEntropy", 1);
        await using CoServingEngine engine = await _model.StartAsync(device: gate.Device(2));
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(new FinetuningRequest
        {
            Adapter = "pairs",
            Dataset = JsonlDataset.Open(path),
            Method = new LoraConfig { Rank = 8, TargetModules = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"] },
            Epochs = 40,
            GradientAccumulation = 4,
            Optimizer = new AdamWOptions { LearningRate = 1e-2f },
        }).Soon();
        Task<FinetuningProgress[]> reading = ReportsAsync(job);
        gate.Open();
        FinetuningProgress[] reports = await reading.Soon();
        Assert.That(reports[1].Loss, Is.GreaterThan(1));
        Assert.That(reports[^1].Loss, Is.LessThan(0.5));
        foreach ((string prompt, string answer) in Pairs)
        {
            GenerationRequest request = new(prompt) { Adapter = "pairs", MaxTokens = 12 };
            GenerationResult result = await engine.CompleteAsync(request).Soon();
            Assert.That((result.Text, result.FinishReason), Is.EqualTo((answer, FinishReason.Stop)));
            Assert.That((await engine.CompleteAsync(request with { Adapter = null }).Soon()).Text, Is.Not.EqualTo(answer));
        }
    }

    [Test]
    public async Task Progress_OfAJob_CountsStepsTokensAndEpochs()
    {
        using var gate = new StepGate("FusedLinearCrossEntropy", 1);
        await using CoServingEngine engine = await _model.StartAsync(device: gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("p")).Soon();
        Task<FinetuningProgress[]> reading = ReportsAsync(job);
        Assert.That(job.Samples, Is.EqualTo(7));
        gate.Open();
        FinetuningProgress[] reports = await reading.Soon();
        Assert.That(reports.Select(r => r.Step), Is.EqualTo(new[] { 0, 1, 2, 3, 4, 5, 6 }));
        Assert.That(reports.Select(r => r.Epoch), Is.EqualTo(new[] { 1, 1, 1, 1, 2, 2, 2 }));
        Assert.That(reports, Has.All.With.Property("Steps").EqualTo(6));
        Assert.That(reports[0].Loss, Is.NaN);
        Assert.That(reports[1..].Select(r => r.Loss), Has.All.InRange(0.5, 30));
        Assert.That(reports[^1].TokensDone, Is.EqualTo(2 * 127));
        Assert.That(reports[^1].Status, Is.EqualTo(FinetuningStatus.Completed));
        Assert.That(reports[^1].TokensPerSecond, Is.Positive);
        Assert.That(await ReportsAsync(job).Soon(), Is.EqualTo(new[] { reports[^1] }), "a late reader gets the end");
        Assert.That((await engine.GetStatisticsAsync().Soon()).TokensTrained, Is.EqualTo(2 * 127));
        Assert.That(await job.PauseAsync().FaultAsync(), Is.TypeOf<RequestRejectedException>());
        await job.CancelAsync().Soon();
        Assert.That((await job.Completion.Soon()).Status, Is.EqualTo(FinetuningStatus.Completed));
    }

    [Test]
    public async Task Train_OfAnExistingAdapter_GoesOnFromItsWeights()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        await engine.TrainAsync(Jobs.Request("x") with { Epochs = 1 });
        FinetuningProgress more = await engine.TrainAsync(Jobs.Request("x") with { Epochs = 1 });
        FinetuningProgress same = await engine.TrainAsync(Jobs.Request("y") with { Epochs = 1 });
        Assert.That(more.Loss, Is.LessThan(same.Loss));
        Exception? other = await engine.StartFinetuningAsync(
            Jobs.Request("x") with { Method = new LoraConfig { Rank = 5 } }).FaultAsync();
        Assert.That(other, Is.TypeOf<RequestRejectedException>().With.Message.Contains("rank 4"));
        FinetuningJob with = await engine.StartFinetuningAsync(Jobs.Request("x") with { Method = null }).Soon();
        await with.Completion.Soon();
    }

    [Test]
    public async Task Start_WhatCannotRun_IsRejectedAndKeepsNothing()
    {
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { JobsMax = 1 });
        await engine.TrainAsync(Jobs.Request("r"));
        await engine.Adapters.UnloadAsync("r").Soon();
        long before = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        FinetuningRequest good = Jobs.Request("r");
        foreach (FinetuningRequest request in (FinetuningRequest[])[
            good with { Adapter = " " },
            good with { Epochs = 0 },
            good with { GradientAccumulation = 0 },
            good with { SampleTokensMax = 1 },
            good with { PublishEverySteps = 0 },
            good with { Weight = 0 },
            good with { Optimizer = new AdamWOptions { LearningRate = 0 } },
            good with { Optimizer = new AdamWOptions { Beta2 = 1 } },
            good with { Optimizer = new SgdOptions { Nesterov = true } },
            good with { Method = new LoraConfig { TargetModules = ["nope"] } },
            good with { Dataset = Jobs.Dataset(1, 300) },
            good with { Dataset = TrainingDataset.FromExamples([]) }])
        {
            Assert.That(await engine.StartFinetuningAsync(request).FaultAsync(), Is.TypeOf<RequestRejectedException>(),
                request.ToString());
        }

        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(before));
        FinetuningJob job = await engine.StartFinetuningAsync(good with { Epochs = 5000 }).Soon();
        Assert.That(
            await engine.StartFinetuningAsync(Jobs.Request("s")).FaultAsync(),
            Is.TypeOf<RequestRejectedException>().With.Message.StartsWith("1 finetuning jobs").And.Message.Contains("JobsMax"));
        await job.CancelAsync().Soon();
        Assert.That(await job.Completion.FaultAsync(), Is.InstanceOf<OperationCanceledException>());
        await engine.Adapters.UnloadAsync("r").Soon();
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(before));
    }

    [Test]
    public async Task Start_BeyondTheMemoryLimit_IsRejectedWithWhatItNeeds()
    {
        // The smallest KV cache: it has nothing to lend.
        var options = new CoServingOptions { KvCacheTokens = _model.Config.MaxPositions };
        long bytes;
        long needed;
        await using (CoServingEngine measured = await _model.StartAsync(options))
        {
            bytes = (await measured.GetStatisticsAsync().Soon()).DeviceBytes;
            FinetuningJob job = await measured.StartFinetuningAsync(Jobs.Request("j") with { Epochs = 5000 }).Soon();
            needed = (await measured.GetStatisticsAsync().Soon()).JobBytes;
            await job.CancelAsync().Soon();
        }

        // A second sample in flight doubles what it holds at most, and is not what it needs.
        await using CoServingEngine engine = await _model.StartAsync(options with { DeviceBytesMax = bytes + (needed / 2) - 1 });
        Exception? fault = await engine.StartFinetuningAsync(Jobs.Request("j")).FaultAsync();
        Assert.That(fault, Is.TypeOf<RequestRejectedException>().With.Message.Contains("does not fit"));
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(bytes));
        Exception? load = await _model.StartAsync(new CoServingOptions { DeviceBytesMax = 100_000 }).FaultAsync();
        Assert.That(load, Is.TypeOf<RequestRejectedException>().With.Message.Contains("does not fit"));
    }

    [Test]
    public async Task Start_TwiceOnOneAdapter_IsRejected()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("r") with { Epochs = 5000 }).Soon();
        Assert.That(await engine.StartFinetuningAsync(Jobs.Request("r")).FaultAsync(), Is.TypeOf<RequestRejectedException>());
        await job.CancelAsync().Soon();
        FinetuningJob next = await engine.StartFinetuningAsync(Jobs.Request("r")).Soon();
        await next.Completion.Soon();
    }

    private static async Task<FinetuningProgress[]> ReportsAsync(FinetuningJob job)
    {
        var reports = new List<FinetuningProgress>();
        await foreach (FinetuningProgress report in job.Progress())
        {
            reports.Add(report);
        }

        return [.. reports];
    }
}
