using FlexLLM.Backends;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>An engine on a group of devices answers, learns and refuses as on one.</summary>
[DeviceFixture]
internal sealed class GroupEngineTests
{
    private static readonly CoServingOptions Options = new() { TokensPerStepMax = 32, KvCacheTokens = 2048 };

    private readonly GenerationRequest[] _requests = Answers.Mixed(6, maxTokens: 20, null, "a", "b");
    private TinyModel _model = null!;

    private static readonly PeftConfig[] Methods =
    [
        new LoraConfig { Rank = 4, TargetModules = PeftConfig.AllModules },
        new SerialAdapterConfig { Size = 6, Activation = AdapterActivation.Silu },
        new Ia3Config(),
    ];

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Qwen3);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Answers_OfManyRequestsWithAdapters_AreThoseOfOneDevice()
    {
        int[][] expected = await AskAsync(TestDevice.Of());
        Assert.That(expected.SelectMany(tokens => tokens).Distinct().Count(), Is.GreaterThan(20), "Control: they say something.");
        Assert.That(await AskAsync(RankDevice.Group(2)), Is.EqualTo(expected));
    }

    [ManagedOnly("the same bits in any company")]
    [Test]
    public async Task Answers_InCompany_HaveTheBitsOfThoseAlone()
    {
        await using CoServingEngine engine = await StartAsync(RankDevice.Group(2));
        Task<FinetuningProgress> training = engine.TrainAsync(Jobs.Request("j") with { Epochs = 8 });
        string[] together = await engine.AskTogetherAsync(_requests);
        await training;
        Assert.That(await engine.AskAloneAsync(_requests), Is.EqualTo(together));
    }

    [TestCaseSource(nameof(Methods))]
    public async Task Job_OfAnyMethod_LearnsAsOnOneDevice(PeftConfig method)
    {
        FinetuningRequest request = Jobs.Request("j") with { Method = method };
        (double loss, byte[] weights) = await TrainAsync(TestDevice.Of(), request);
        (double groupLoss, byte[] groupWeights) = await TrainAsync(RankDevice.Group(2), request);
        Assert.That(groupLoss, Is.EqualTo(loss).Within(1e-3));
        Assert.That(Jobs.Error(groupWeights, weights), Is.LessThan(1e-2));
        (double untrained, _) = await TrainAsync(TestDevice.Of(), request with { Epochs = 1 });
        Assert.That(Math.Abs(untrained - loss), Is.GreaterThan(1e-2), "Control: another number of steps is another loss.");
    }

    [Test]
    public async Task Checkpoint_OfAGroup_GoesOnOnOneDeviceAndBack()
    {
        FinetuningRequest request = Jobs.Request("j") with { Epochs = 30 };
        (double expected, byte[] weights) = await TrainAsync(TestDevice.Of(), request);
        string first = await StopAsync(gate => gate.Group(2), request, "first");
        string second = await StopAsync(gate => gate.Device(), request with { ResumeFrom = first }, "second");
        (double loss, byte[] resumed) = await TrainAsync(RankDevice.Group(2), request with { ResumeFrom = second });
        Assert.That(loss, Is.EqualTo(expected).Within(1e-2 * Math.Max(1, expected)));
        Assert.That(Jobs.Error(resumed, weights), Is.LessThan(0.05));
    }

    [Test]
    public async Task DeviceBytes_AfterAJob_AreWhatTheyWereBefore()
    {
        await using CoServingEngine engine = await StartAsync(RankDevice.Group(2));
        await engine.TrainAsync(Jobs.Request("j"));
        await engine.Adapters.UnloadAsync("j").Soon();
        long before = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        await engine.TrainAsync(Jobs.Request("j"));
        await engine.Adapters.UnloadAsync("j").Soon();
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(before));
    }

    [Test]
    public async Task Rank_ThatRunsOutOfMemory_CostsTheJobAndNotTheGroup([Values(0, 1)] int rank, [Values] bool inBackward)
    {
        int left = -1;
        string operation = inBackward ? "AttentionBackward" : "FusedLinearCrossEntropy";
        await using CoServingEngine engine = await StartAsync(RankDevice.Group(2, (index, name) =>
        {
            if (index == rank && name == operation && Interlocked.Decrement(ref left) == 0)
            {
                throw new InsufficientMemoryException("No more.");
            }
        }));
        int[][] expected = await AskAsync(engine);
        Volatile.Write(ref left, 3);
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { Epochs = 50 }).Soon();
        Task<int[][]> beside = AskAsync(engine);
        Assert.That(await job.Completion.FaultAsync(), Is.InstanceOf<OutOfMemoryException>());
        Assert.That(await beside.Soon(), Is.EqualTo(expected));
        await engine.TrainAsync(Jobs.Request("k"));
    }

    // The prompts are longer than a step: some batches sample nothing, in others whole rows of logits go to the host.
    [Test]
    public async Task Rank_ThatRunsOutOfMemoryInABatch_CostsBlocksAndNoAnswer(
        [Values(0, 1)] int rank, [Values("Linear", "Attention")] string operation, [Values(1, 14)] int call)
    {
        int left = -1;
        await using CoServingEngine engine = await StartAsync(RankDevice.Group(2, (index, name) =>
        {
            if (index == rank && name == operation && Interlocked.Decrement(ref left) == 0)
            {
                throw new InsufficientMemoryException("No more.");
            }
        }));
        int[][] expected = await AskAsync(engine);
        Volatile.Write(ref left, call);
        Assert.That(await AskAsync(engine), Is.EqualTo(expected));
        Assert.That(left, Is.LessThan(0), "Control: it failed once.");
        Assert.That(await AskAsync(engine), Is.EqualTo(expected));
    }

    [Test]
    public async Task Rank_ThatFails_EndsTheEngineWithItsCause()
    {
        bool fails = false;
        await using CoServingEngine engine = await StartAsync(RankDevice.Group(2, (index, name) =>
        {
            if (index == 1 && name == "Linear" && Volatile.Read(ref fails))
            {
                throw new InvalidOperationException("The fan is broken.");
            }
        }));
        Volatile.Write(ref fails, true);
        Exception? fault = await engine.CompleteAsync(_requests[0] with { Adapter = null }).FaultAsync();
        Assert.That(fault, Is.TypeOf<EngineFaultedException>().With.Message.Contains("The fan is broken."));
    }

    [Test]
    public async Task Load_OnADegreeThatDoesNotDivide_IsRefusedWithThoseThatDo()
    {
        Exception? fault = await _model.StartAsync(device: RankDevice.Group(3)).FaultAsync();
        Assert.That(fault, Is.TypeOf<RequestRejectedException>().With.Message.Contains("degree of 3").And.Message.Contains("1, 2"));
    }

    [Test]
    public async Task Load_WithAByteTooFew_IsRefusedByWhatAllRanksNeed()
    {
        CoServingOptions least = Options with { KvCacheTokens = _model.Config.MaxPositions };
        await using CoServingEngine engine = await _model.StartAsync(least, RankDevice.Group(2));
        long needed = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        Exception? fault = await _model.StartAsync(least with { DeviceBytesMax = needed - 1 }, RankDevice.Group(2)).FaultAsync();
        Assert.That(fault, Is.TypeOf<RequestRejectedException>().With.Message.Contains("DeviceBytesMax"));
        await using CoServingEngine fitting = await _model.StartAsync(least with { DeviceBytesMax = needed }, RankDevice.Group(2));
        Assert.That((await fitting.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(needed));
    }

    [Test]
    public void Group_OfNoneOrOfGroups_IsRefused()
    {
        Assert.Throws<ArgumentException>(() => ComputeDevice.Group());
        Assert.Throws<ArgumentException>(() => ComputeDevice.Group(TestDevice.Of(), RankDevice.Group(2)));
        Assert.That(ComputeDevice.Group(TestDevice.Of()), Is.InstanceOf(TestDevice.Of().GetType()), "of one is that one");
    }

    private async Task<CoServingEngine> StartAsync(ComputeDevice device)
    {
        CoServingEngine engine = await _model.StartAsync(Options, device);
        var lora = new LoraConfig { Rank = 4, Alpha = 8, TargetModules = PeftConfig.AllModules };
        await engine.Adapters.LoadAsync("a", _model.WriteAdapter("a", lora, seed: 1)).Soon();
        await engine.Adapters.LoadAsync("b", _model.WriteAdapter("b", lora with { Rank = 5 }, seed: 2)).Soon();
        return engine;
    }

    private async Task<int[][]> AskAsync(ComputeDevice device)
    {
        await using CoServingEngine engine = await StartAsync(device);
        return await AskAsync(engine);
    }

    private async Task<int[][]> AskAsync(CoServingEngine engine)
    {
        GenerationResult[] results = await Task.WhenAll(_requests.Select(request => engine.CompleteAsync(request))).Soon();
        return [.. results.Select(result => result.Tokens.ToArray())];
    }

    private async Task<(double Loss, byte[] Weights)> TrainAsync(ComputeDevice device, FinetuningRequest request)
    {
        await using CoServingEngine engine = await _model.StartAsync(Options, device);
        FinetuningProgress end = await engine.TrainAsync(request);
        return (end.Loss, await Jobs.WeightsAsync(engine, "j", _model["trained"]));
    }

    // While the fourth step of the run is in progress; the checkpoint is written after it.
    private async Task<string> StopAsync(Func<StepGate, ComputeDevice> device, FinetuningRequest request, string name)
    {
        int tensors = 2 * 2 * request.Method!.TargetModules.Count; // Two layers, two factors.
        using var gate = new StepGate(nameof(IComputeBackend.AdamWStep), (3 * tensors) + 1);
        await using CoServingEngine engine = await _model.StartAsync(Options, device(gate));
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(request).Soon();
        await gate.ReachedAsync();
        Task saved = job.SaveCheckpointAsync(_model[name]);
        gate.Open();
        await saved.Soon();
        return _model[name];
    }
}
