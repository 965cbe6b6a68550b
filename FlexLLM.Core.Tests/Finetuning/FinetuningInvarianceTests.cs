using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>Law 2b: a job ends with the same bits for every schedule of windows, with any company, and after any pause.</summary>
[DeviceFixture(ModelArchitecture.Llama)]
[DeviceFixture(ModelArchitecture.Qwen2)]
[DeviceFixture(ModelArchitecture.Qwen3)]
internal sealed class FinetuningInvarianceTests(ModelArchitecture architecture)
{
    private TinyModel _model = null!;
    private byte[] _expected = null!;

    [OneTimeSetUp]
    public async Task SetUp()
    {
        _model = new TinyModel(architecture);
        await using CoServingEngine engine = await _model.StartAsync();
        FinetuningProgress end = await engine.TrainAsync(Jobs.Request("j"));
        Assert.That(end.Step, Is.EqualTo(6));
        _expected = await BytesAsync(engine);
    }

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Train_WithThreads_SameBits([Values(2, 3)] int threads)
    {
        await using CoServingEngine engine = await _model.StartAsync(device: TestDevice.Of(threads));
        await engine.TrainAsync(Jobs.Request("j"));
        Assert.That(await BytesAsync(engine), Jobs.SameAs(_expected));
    }

    [Test]
    public async Task Train_InSmallWindows_SameBits([Values(1, 3, 8)] int tokensPerStep)
    {
        await using CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { TokensPerStepMax = tokensPerStep, SequencesMax = 1 });
        await engine.TrainAsync(Jobs.Request("j"));
        Assert.That(await BytesAsync(engine), Jobs.SameAs(_expected));
    }

    [Test]
    public async Task Train_InWindowsOfChance_SameBits()
    {
        // So little time for a step that its windows are what the measured speed of the moment makes them.
        await using CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { IdleStepMax = TimeSpan.FromMicroseconds(600), ProfilingTimeMax = TinyModel.ProfilingTime });
        await engine.TrainAsync(Jobs.Request("j") with { PublishEverySteps = 1 });
        Assert.That(await BytesAsync(engine), Jobs.SameAs(_expected));
    }

    [Test]
    public async Task Train_BesideTraffic_SameBits([Values(1, 2)] int threads)
    {
        await using CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { TokensPerStepMax = 20, SequencesMax = 20 }, TestDevice.Of(threads));
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { PublishEverySteps = 2 }).Soon();
        Task<int> traffic = TrafficAsync(engine, job);
        await job.Completion.Soon();
        Assert.That(await traffic.Soon(), Is.Positive);
        Assert.That(await BytesAsync(engine), Jobs.SameAs(_expected));
    }

    // Requests come from the loop's own thread, in the middle of windows, which are then begun again. Where time stands still, every
    // moment is an early one.
    [Test]
    public async Task Train_InWindowsThatAreGivenUp_SameBits()
    {
        const int Requests = 10;
        CoServingEngine? asked = null;
        var answers = new List<Task<string>>();
        var device = new ProbedDevice(operation =>
        {
            if (operation == "Linear" && asked is not null && answers.Count < Requests && answers.All(a => a.IsCompleted))
            {
                answers.Add(asked.AskAsync(Answers.Mixed(1, maxTokens: 3)[0]));
            }
        });
        await using CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { Clock = new StillClock(), ProfilingTimeMax = TimeSpan.Zero }, device);
        asked = engine;
        await engine.TrainAsync(Jobs.Request("j"));
        await Task.WhenAll(answers).Soon();
        Assert.That(await engine.CallAsync(loop => loop.Counters.StepsGivenUp, default).Soon(), Is.Positive);
        Assert.That(await BytesAsync(engine), Jobs.SameAs(_expected));
    }

    [Test]
    public async Task Train_PausedAtAnyMoment_SameBits(
        [Values("FusedLinearCrossEntropy", "AttentionBackward", "AdamWStep")] string operation)
    {
        using var gate = new StepGate(operation, 5);
        await using CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { TokensPerStepMax = 16, SequencesMax = 16 }, gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        await gate.ReachedAsync();
        Task paused = job.PauseAsync();
        gate.Open();
        await paused.Soon();
        Assert.That(job.Latest.Status, Is.EqualTo(FinetuningStatus.Paused));
        FinetuningProgress before = job.Latest;
        await engine.AskTogetherAsync(Answers.Mixed(3, maxTokens: 6));
        Assert.That(job.Latest, Is.EqualTo(before), "a paused job does nothing");
        await job.ResumeAsync().Soon();
        await job.Completion.Soon();
        Assert.That(await BytesAsync(engine), Jobs.SameAs(_expected));
    }

    [Test]
    public async Task Train_BesideAnotherJob_SameBits([Values(0.3, 4)] double weight)
    {
        using var gate = new StepGate("FusedLinearCrossEntropy", 1);
        await using CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { TokensPerStepMax = 16, SequencesMax = 16 }, gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { Weight = weight }).Soon();
        await gate.ReachedAsync();
        Task<FinetuningJob> started = engine.StartFinetuningAsync(Jobs.Request("other", seed: 2) with
        {
            Method = new LoraConfig { Rank = 2, TargetModules = ["k_proj", "up_proj"] },
            Optimizer = new SgdOptions { LearningRate = 0.1f },
        });
        gate.Open();
        FinetuningJob other = await started.Soon();
        await Task.WhenAll(job.Completion, other.Completion).Soon();
        Assert.That(await BytesAsync(engine), Jobs.SameAs(_expected));
    }

    /// <summary>Control: the bytes of another job are other bytes.</summary>
    [Test]
    public async Task Train_OtherOrder_OtherBits()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        await engine.TrainAsync(Jobs.Request("j") with { ShuffleSeed = 12 });
        Assert.That(await BytesAsync(engine), !Jobs.SameAs(_expected));
    }

    private static async Task<int> TrafficAsync(CoServingEngine engine, FinetuningJob job)
    {
        int answered = 0;
        do
        {
            answered += (await engine.AskTogetherAsync(Answers.Mixed(3, maxTokens: 8, null, "j"))).Length;
        }
        while (!job.Completion.IsCompleted);

        return answered;
    }

    private Task<byte[]> BytesAsync(CoServingEngine engine) => Jobs.WeightsAsync(engine, "j", _model["saved"]);

    private sealed class StillClock : TimeProvider
    {
        public override long GetTimestamp() => 0;
    }
}
