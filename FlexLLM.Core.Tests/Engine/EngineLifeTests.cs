using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>
/// Cancellation, slow readers, full queues and disposal: whatever happens, nobody waits for ever and no byte is left.
/// </summary>
[DeviceFixture]
internal sealed class EngineLifeTests
{
    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Llama);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Cancel_ByTokenAtAnyMoment_EndsTheRequestAndFreesItsBlocks()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        for (int after = 0; after < 12; after += 3)
        {
            using var cancel = new CancellationTokenSource();
            int read = 0;
            Exception? fault = await ReadAsync().FaultAsync();
            Assert.That(fault, Is.InstanceOf<OperationCanceledException>(), $"after {after} tokens");
            await IdleAsync(engine);

            async Task ReadAsync()
            {
                if (after == 0)
                {
                    await cancel.CancelAsync();
                }

                await foreach (GeneratedToken _ in engine.GenerateAsync(Endless(), cancel.Token))
                {
                    if (++read == after)
                    {
                        await cancel.CancelAsync();
                    }
                }
            }
        }

        Assert.That(await engine.AskAsync(Endless() with { MaxTokens = 3 }), Does.Contain("Length"));
    }

    [Test]
    public async Task Cancel_ByLeavingTheLoop_EndsTheRequestAndFreesItsBlocks()
    {
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { RequestsMax = 1 });
        for (int i = 0; i < 3; i++)
        {
            await Task.Run(async () =>
            {
                await foreach (GeneratedToken _ in engine.GenerateAsync(Endless()))
                {
                    break;
                }
            }).Soon();
        }

        await IdleAsync(engine);
    }

    [Test]
    public async Task Read_SlowConsumer_HoldsUpNobody()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        await using IAsyncEnumerator<GeneratedToken> slow = engine.GenerateAsync(
            Endless() with { MaxTokens = 40 }).GetAsyncEnumerator();
        await slow.MoveNextAsync().Soon();
        await engine.TrainAsync(Jobs.Request("j"));
        await engine.AskTogetherAsync(Answers.Mixed(5, maxTokens: 10));
        await IdleAsync(engine);
        int read = 1;
        while (await slow.MoveNextAsync().Soon())
        {
            read++;
        }

        Assert.That(read, Is.EqualTo(40), "nothing of the answer was lost");
    }

    [Test]
    public async Task Queues_OfOnePlace_ServeEverybodyInTheEnd()
    {
        await using CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { InboxCapacity = 1, RequestsMax = 2, SequencesMax = 1, TokensPerStepMax = 8 });
        GenerationRequest[] requests = Answers.Mixed(20, maxTokens: 5);
        Task<string[]> answers = engine.AskTogetherAsync(requests);
        Task<EngineStatistics>[] calls = [.. Enumerable.Range(0, 20).Select(_ => engine.GetStatisticsAsync())];
        Assert.That(await answers, Has.All.Not.Empty);
        Assert.That((await Task.WhenAll(calls).Soon()).Max(s => s.RequestsActive), Is.LessThanOrEqualTo(2));
        Assert.That((await engine.GetStatisticsAsync().Soon()).RequestsFinished, Is.EqualTo(20));
    }

    [Test]
    public async Task Dispose_InTheMiddleOfEverything_EndsEverybody()
    {
        using var gate = new StepGate("Logits", 1);
        CoServingEngine engine = await _model.StartAsync(new CoServingOptions { InboxCapacity = 1, RequestsMax = 6 }, gate.Device());
        await engine.Adapters.CreateAsync("a", new LoraConfig()).Soon();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { Epochs = 10_000 }).Soon();
        FinetuningJob paused = await engine.StartFinetuningAsync(Jobs.Request("p") with { Epochs = 10_000 }).Soon();
        await paused.PauseAsync().Soon();
        Task<int> progress = CountAsync(job);
        gate.Arm();
        Task<string>[] answers = [.. Enumerable.Range(0, 12).Select(i =>
            Answers.OfAsync(engine, Endless() with { Adapter = i % 2 == 0 ? "a" : null }))];
        Task[] calls = [.. Enumerable.Range(0, 10).Select(i => (Task)engine.Adapters.RenameAsync("a", "a"))];
        await gate.ReachedAsync();
        Task disposed = engine.DisposeAsync().AsTask();
        gate.Open();
        await disposed.Soon();
        foreach (Task<string> answer in answers)
        {
            Assert.That(await answer.FaultAsync(), Is.TypeOf<ObjectDisposedException>());
        }

        foreach (Task call in calls)
        {
            Assert.That(await call.FaultAsync(), Is.TypeOf<ObjectDisposedException>().Or.TypeOf<RequestRejectedException>());
        }

        Assert.That(await job.Completion.FaultAsync(), Is.InstanceOf<OperationCanceledException>());
        Assert.That(await paused.Completion.FaultAsync(), Is.InstanceOf<OperationCanceledException>());
        Assert.That(job.Latest.Status, Is.EqualTo(FinetuningStatus.Cancelled));
        await progress.Soon();
        Assert.That(engine.Backend.AllocatedBytes, Is.Zero);
        await engine.DisposeAsync().Soon();
    }

    [Test]
    public async Task Dispose_WhileReadersStandStill_EndsThoseWhoWaitForTheirPlace()
    {
        using var gate = new StepGate("Logits", 2);
        CoServingEngine engine = await _model.StartAsync(new CoServingOptions { RequestsMax = 1 }, gate.Device());
        gate.Arm();
        await using IAsyncEnumerator<GeneratedToken> reader = engine.GenerateAsync(Endless()).GetAsyncEnumerator();
        await reader.MoveNextAsync().Soon();
        Task<string> waiting = Answers.OfAsync(engine, Endless());
        await gate.ReachedAsync();
        Task disposed = engine.DisposeAsync().AsTask();
        gate.Open();
        await disposed.Soon();
        Assert.That(await waiting.FaultAsync(), Is.TypeOf<ObjectDisposedException>());
        Exception? fault = null;
        for (int read = 0; fault is null && read < 10; read++)
        {
            fault = await reader.MoveNextAsync().AsTask().FaultAsync();
        }

        Assert.That(fault, Is.TypeOf<ObjectDisposedException>(), "tokens of before may still be read, then comes the cause");
    }

    [Test]
    public async Task Call_AfterDispose_Throws()
    {
        CoServingEngine engine = await _model.StartAsync();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { Epochs = 1000 }).Soon();
        await engine.DisposeAsync().Soon();
        Task[] calls =
        [
            engine.CompleteAsync(Endless()), engine.GetStatisticsAsync(), engine.StartFinetuningAsync(Jobs.Request("k")),
            engine.Adapters.ListAsync(), engine.Adapters.CreateAsync("x", new LoraConfig()), job.PauseAsync(), job.CancelAsync(),
            job.SaveCheckpointAsync(_model["none"]),
        ];
        foreach (Task call in calls)
        {
            Assert.That(await call.FaultAsync(), Is.TypeOf<ObjectDisposedException>());
        }
    }

    [Test]
    public async Task Dispose_AfterWork_LeavesNoByte([Values(1, 2)] int threads)
    {
        CoServingEngine engine = await _model.StartAsync(device: TestDevice.Of(threads));
        await engine.TrainAsync(Jobs.Request("j") with { PublishEverySteps = 1 });
        await engine.AskTogetherAsync(Answers.Mixed(6, 6, null, "j"));
        FinetuningJob cancelled = await engine.StartFinetuningAsync(Jobs.Request("j") with { Epochs = 9000 }).Soon();
        await cancelled.CancelAsync().Soon();
        Assert.That(cancelled.Completion.IsCanceled);
        Assert.That(engine.Backend.AllocatedBytes, Is.Positive);
        await engine.DisposeAsync().Soon();
        Assert.That(engine.Backend.AllocatedBytes, Is.Zero);
    }

    [Test]
    public async Task Memory_OfManyRoundsOfWork_DoesNotGrow()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        var bytes = new List<long>();
        for (int round = 0; round < 4; round++)
        {
            await engine.TrainAsync(Jobs.Request("j") with { PublishEverySteps = 1, Epochs = 1 });
            await engine.AskAloneAsync(Answers.Mixed(3, 6, null, "j"));
            await engine.Adapters.UnloadAsync("j").Soon();
            bytes.Add((await engine.GetStatisticsAsync().Soon()).DeviceBytes);
        }

        Assert.That(bytes[^1], Is.EqualTo(bytes[1]), string.Join(' ', bytes));
    }

    [Test]
    public async Task Load_Cancelled_Throws()
    {
        using var cancel = new CancellationTokenSource();
        await cancel.CancelAsync();
        Assert.That(
            await CoServingEngine.LoadAsync(_model.Folder, null, cancel.Token).FaultAsync(),
            Is.InstanceOf<OperationCanceledException>());
    }

    private static GenerationRequest Endless() =>
        new(TinyModel.Ids(6, 1))
        {
            MaxTokens = 240,
            IgnoreEos = true,
            Sampling = new SamplingOptions { Temperature = 1, Seed = 1 },
        };

    private static async Task<int> CountAsync(FinetuningJob job)
    {
        int reports = 0;
        await foreach (FinetuningProgress _ in job.Progress())
        {
            reports++;
        }

        return reports;
    }

    // A cancelled request leaves before the next step, which may take a moment to come.
    private static async Task IdleAsync(CoServingEngine engine)
    {
        EngineStatistics statistics;
        do
        {
            statistics = await engine.GetStatisticsAsync().Soon();
        }
        while (statistics.RequestsActive > 0);

        Assert.That(statistics.KvBlocksHeld, Is.Zero);
    }
}
