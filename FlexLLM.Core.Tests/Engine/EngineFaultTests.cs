using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>Law 6: bad numbers cost one request; a broken device costs the engine, and every waiter learns the cause.</summary>
[DeviceFixture]
internal sealed class EngineFaultTests
{
    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp()
    {
        _model = new TinyModel(ModelArchitecture.Qwen3);
        _model.WriteAdapter(
            "overflow", new LoraConfig { Rank = 2, TargetModules = ["v_proj", "down_proj"] }, seed: 1, deviation: 1e20f);
    }

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Logits_NotFinite_EndThatRequestAlone()
    {
        GenerationRequest[] others = Answers.Mixed(5, maxTokens: 24);
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { KvCacheTokens = 320 });
        string[] expected = await engine.AskAloneAsync(others);
        await engine.Adapters.LoadAsync("overflow", _model["overflow"]).Soon();
        var broken = new GenerationRequest(TinyModel.Ids(40, 3)) { Adapter = "overflow", IgnoreEos = true };
        Task<GenerationResult>[] results = [.. Enumerable.Range(0, 4).Select(_ => engine.CompleteAsync(broken))];
        Assert.That(await engine.AskTogetherAsync(others), Is.EqualTo(expected));
        foreach (GenerationResult result in await Task.WhenAll(results).Soon())
        {
            Assert.That(result.FinishReason, Is.EqualTo(FinishReason.Error));
            Assert.That(result.FinishDetail, Does.Contain("not finite"));
        }

        // The blocks that held those numbers now hold others'.
        Assert.That(await engine.AskTogetherAsync(others), Is.EqualTo(expected));
        Assert.That(await engine.AskAloneAsync(others), Is.EqualTo(expected));
    }

    [Test]
    public async Task Loss_NotFinite_FailsThatJobAlone()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        await engine.TrainAsync(Jobs.Request("good"));
        byte[] expected = await Jobs.WeightsAsync(engine, "good", _model["good"]);
        await engine.Adapters.UnloadAsync("good").Soon();
        await engine.Adapters.LoadAsync("overflow", _model["overflow"]).Soon();
        FinetuningJob bad = await engine.StartFinetuningAsync(Jobs.Request("overflow") with { Method = null }).Soon();
        FinetuningJob good = await engine.StartFinetuningAsync(Jobs.Request("good")).Soon();
        Assert.That(await bad.Completion.FaultAsync(), Is.TypeOf<FlexLlmException>().With.Message.Contains("loss"));
        Assert.That(bad.Latest.Status, Is.EqualTo(FinetuningStatus.Failed));
        await good.Completion.Soon();
        Assert.That(await Jobs.WeightsAsync(engine, "good", _model["good"]), Jobs.SameAs(expected));
    }

    // One call of each kind fails while requests run, a job trains, an adapter is saved, and callers wait.
    [TestCase("Linear", 40)]
    [TestCase("Attention", 9)]
    [TestCase("Logits", 3)]
    [TestCase("ArgMax", 3)]
    [TestCase("Largest", 3)]
    [TestCase("Download", 1)]
    [TestCase("Allocate", 30)]
    [TestCase("CreateKvCache", 1)]
    [TestCase("ReserveScratch", 1)]
    [TestCase("CreateFactor", 1)]
    [TestCase("CreateFactor", 16)]
    [TestCase("CreateFactor", 27)]
    [TestCase("Copy", 3)]
    [TestCase("RefreshFactor", 3)]
    [TestCase("FusedLinearCrossEntropy", 2)]
    [TestCase("AttentionBackward", 2)]
    [TestCase("LoraBypassBackward", 3)]
    [TestCase("AdamWStep", 2)]
    [TestCase("Zero", 1)]
    public async Task Device_Fails_FaultsEveryWaiterAndFreesEverything(string operation, int call)
    {
        int left = -1;
        CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { RequestsMax = 3, TokensPerStepMax = 32 },
            new ProbedDevice(name =>
            {
                if (name == operation && --left == 0)
                {
                    throw new InvalidOperationException("The device is gone.");
                }
            }));
        Volatile.Write(ref left, call);
        Task<FinetuningJob> started = engine.StartFinetuningAsync(
            Jobs.Request("j") with { Epochs = 1000, PublishEverySteps = 1 });
        Task<AdapterInfo> created = engine.Adapters.CreateAsync("c", new LoraConfig());
        Task<string>[] answers = [.. Enumerable.Range(0, 6).Select(i => AnswerForEverAsync(engine, topK: i % 2))];
        foreach (Task<string> answer in answers)
        {
            Exception? fault = await answer.FaultAsync();
            Assert.That(fault, Is.TypeOf<EngineFaultedException>());
            Assert.That(Cause(fault!), Is.TypeOf<InvalidOperationException>());
        }

        Exception? job = await started.FaultAsync() ?? await (await started).Completion.FaultAsync();
        Assert.That(job, Is.TypeOf<EngineFaultedException>());
        Assert.That(await created.FaultAsync(), Is.Null.Or.TypeOf<EngineFaultedException>());
        Assert.That(await engine.GetStatisticsAsync().FaultAsync(), Is.TypeOf<EngineFaultedException>());
        await engine.DisposeAsync().Soon();
        Assert.That(engine.Backend.AllocatedBytes, Is.Zero);
    }

    [TestCase("Allocate", 3)]
    [TestCase("Allocate", 12)]
    [TestCase("CreateKvCache", 1)]
    [TestCase("ReserveScratch", 1)]
    [TestCase("Upload", 2)]
    [TestCase("Linear", 1)]
    public async Task Device_FailsWhileLoading_ThrowsTheCause(string operation, int call)
    {
        int left = call;
        var device = new ProbedDevice(name =>
        {
            if (name == operation && --left == 0)
            {
                throw new InvalidOperationException("The device is gone.");
            }
        });
        Exception? fault = await CoServingEngine.LoadAsync(_model.Folder, new CoServingOptions { Device = device }).FaultAsync();
        Assert.That(fault, Is.TypeOf<InvalidOperationException>());
        Assert.That(device.Backend!.AllocatedBytes, Is.Zero);
    }

    // Memory that runs out while a caller's wish is served costs that caller, and leaves nothing behind.
    [TestCase("Allocate", 1)]
    [TestCase("Allocate", 20)]
    [TestCase("Allocate", 44)]
    [TestCase("CreateKvCache", 1)]
    [TestCase("ReserveScratch", 1)]
    [TestCase("CreateFactor", 7)]
    [TestCase("CreateFactor", 20)]
    public async Task Memory_RunsOutWhileAJobStarts_RejectsTheJobAlone(string operation, int call)
    {
        int left = -1;
        await using CoServingEngine engine = await _model.StartAsync(device: new ProbedDevice(name =>
        {
            if (name == operation && --left == 0)
            {
                throw new InsufficientMemoryException("No more.");
            }
        }));
        GenerationRequest request = Answers.Mixed(1, maxTokens: 30)[0];
        string expected = await engine.AskAsync(request);
        long before = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        Task<string> beside = Answers.OfAsync(engine, request);
        Volatile.Write(ref left, call);
        Exception? fault = await engine.StartFinetuningAsync(Jobs.Request("j")).FaultAsync();
        Assert.That(left, Is.LessThanOrEqualTo(0), "fewer calls than this case needs");
        Assert.That(fault, Is.TypeOf<RequestRejectedException>().With.Message.Contains("memory"));
        Assert.That(await beside.Soon(), Is.EqualTo(expected));
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(before));
        Assert.That(await engine.Adapters.ListAsync().Soon(), Is.Empty);
        await engine.TrainAsync(Jobs.Request("j"));
    }

    // Requests end; the stream of them does not.
    private static async Task<string> AnswerForEverAsync(CoServingEngine engine, int topK = 0)
    {
        while (true)
        {
            await Answers.OfAsync(engine, new GenerationRequest(TinyModel.Ids(9, 1))
            {
                MaxTokens = 30,
                IgnoreEos = true,
                Sampling = new SamplingOptions { Temperature = topK, TopK = topK },
            });
        }
    }

    private static Exception Cause(Exception fault) => fault.InnerException is null ? fault : Cause(fault.InnerException);
}
