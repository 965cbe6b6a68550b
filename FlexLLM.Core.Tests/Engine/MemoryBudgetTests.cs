using System.Globalization;
using System.Text.RegularExpressions;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Engine;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>
/// One budget: the engine holds what was planned, jobs and adapters take the rest from the KV cache and give it back, and no answer
/// and no adapter changes by a bit.
/// </summary>
[DeviceFixture]
internal sealed partial class MemoryBudgetTests
{
    private const int Extent = DeviceKvCache.BlocksPerExtent;
    private const int Context = 256;

    private static readonly CoServingOptions Roomy = new() { KvCacheTokens = 12 * Context, TokensPerStepMax = 32 };

    private TinyModel _model = null!;
    private GraphCompiler _compiler = null!;
    private IComputeBackend _sizes = null!;
    private GenerationRequest[] _requests = null!;
    private string[] _answers = null!;
    private byte[] _trained = null!;

    [OneTimeSetUp]
    public async Task SetUp()
    {
        _model = new TinyModel(ModelArchitecture.Qwen3);
        _compiler = LoadedModel.Compile(_model.Config);
        _sizes = TestDevice.CreateBackend(1);
        _requests = Answers.Mixed(10, maxTokens: 60);
        await using CoServingEngine engine = await _model.StartAsync(Roomy);
        _answers = await engine.AskAloneAsync(_requests);
        await engine.TrainAsync(Jobs.Request("j"));
        _trained = await Jobs.WeightsAsync(engine, "j", _model["expected"]);
    }

    [OneTimeTearDown]
    public void TearDown()
    {
        _sizes.Dispose();
        _model.Dispose();
    }

    [Test]
    public async Task Load_UnderAnyBudget_HoldsWhatWasPlanned()
    {
        MemoryPlan plan = PlanOf(Roomy, Context);
        long least = EngineBytes(Context / 16);
        foreach (long spare in (long[])[0, (3 * plan.KvBytes(1)) - 1, 7 * plan.KvBytes(Extent), 1L << 40])
        {
            await using CoServingEngine engine = await _model.StartAsync(Roomy with { DeviceBytesMax = least + spare });
            EngineStatistics held = await engine.GetStatisticsAsync().Soon();
            int blocks = (int)Math.Min((Context / 16) + (spare / plan.KvBytes(1)), Roomy.KvCacheTokens!.Value / 16);
            Assert.That((held.KvBlocksTotal, held.KvBlocksMax), Is.EqualTo((blocks, blocks)));
            Assert.That(held.DeviceBytes, Is.EqualTo(EngineBytes(blocks)));
            Assert.That((held.DeviceBytesMax, held.JobBytes), Is.EqualTo((least + spare, 0L)));
            Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(_answers));
            Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(held.DeviceBytes), "no step allocates");
        }
    }

    [Test]
    public async Task Load_BelowTheLeast_IsRefusedWithTheTableAndAContextThatFits()
    {
        long least = EngineBytes(Context / 16);
        CoServingOptions tight = Roomy with { DeviceBytesMax = least - 1 };
        string message = (await _model.StartAsync(tight).FaultAsync())!.Message;
        Assert.That(message, Does.Contain("does not fit").And.Contain("rotary table").And.Contain("together"));
        int context = NumberIn(message, ContextThatFits());
        Assert.That(context, Is.InRange(2, Context - 1));
        await using (CoServingEngine engine = await _model.StartAsync(tight with { ContextTokensMax = context }))
        {
            Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.LessThan(least));
        }

        Exception? more = await _model.StartAsync(tight with { ContextTokensMax = context + 1 }).FaultAsync();
        Assert.That(more, Is.TypeOf<RequestRejectedException>());
        Exception? all = await _model.StartAsync(tight with { DeviceBytesMax = least, KvCacheTokensMin = Context + 1 }).FaultAsync();
        Assert.That(all, Is.TypeOf<RequestRejectedException>(), "what finetuning may not take must be there");
    }

    [Test]
    public async Task Job_WithRoom_HoldsWhatWasPlanned()
    {
        using var gate = new StepGate("AttentionBackward", 9);
        await using CoServingEngine engine = await _model.StartAsync(Roomy, gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        await gate.ReachedAsync();
        Task<EngineStatistics> during = engine.GetStatisticsAsync();
        gate.Open();
        EngineStatistics held = await during.Soon();
        long version = PlanOf(Roomy, Context).OfAdapter(Jobs.Request("j").Method!).Bytes;
        long second = SecondSampleOf(40); // Its groups have three samples.
        Assert.That(held.JobBytes, Is.EqualTo(JobTableOf(40).Bytes + second));
        Assert.That(held.DeviceBytes, Is.EqualTo(EngineBytes(held.KvBlocksTotal) + NeedsOf(40) + second));
        Assert.That(held.KvBlocksTotal, Is.EqualTo(held.KvBlocksMax));
        await job.Completion.Soon();
        held = await engine.GetStatisticsAsync().Soon();
        Assert.That(held.DeviceBytes, Is.EqualTo(EngineBytes(held.KvBlocksTotal) + version));
        Assert.That(held.JobBytes, Is.Zero);
        await engine.Adapters.UnloadAsync("j").Soon();
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(EngineBytes(held.KvBlocksTotal)));
    }

    // The job takes all but one context while requests hold far more; then nothing is left, not a byte.
    [Test]
    public async Task Job_WithoutRoom_TakesTheKvCacheFromRequestsAndGivesItBack()
    {
        int blocks = (Context / 16) + ExtentsOf(NeedsOf(40));
        CoServingOptions tight = Roomy with { KvCacheTokens = 16 * blocks, DeviceBytesMax = EngineBytes(blocks) };
        using var gate = new StepGate("Logits", 25);
        await using CoServingEngine engine = await _model.StartAsync(tight, gate.Device());
        gate.Arm();
        Task<string[]> answers;
        using (HeldLoop.Of(engine))
        {
            answers = engine.AskTogetherAsync(_requests);
        }

        await gate.ReachedAsync();
        Task<EngineStatistics> before = engine.GetStatisticsAsync();
        Task<FinetuningJob> started = StartNow(engine, Jobs.Request("j"));
        gate.Open();
        FinetuningJob job = await started.Soon();
        Assert.That((await before.Soon()).KvBlocksHeld, Is.GreaterThan(Context / 16), "else nothing is taken from anybody");
        EngineStatistics during = await engine.GetStatisticsAsync().Soon();
        Assert.That(during.KvBlocksTotal, Is.LessThan(blocks));
        Assert.That(during.DeviceBytes, Is.LessThanOrEqualTo(tight.DeviceBytesMax));
        Assert.That(during.Preemptions, Is.Positive);
        Assert.That(await answers, Is.EqualTo(_answers));
        await job.Completion.Soon();
        Assert.That(await Jobs.WeightsAsync(engine, "j", _model["tight"]), Jobs.SameAs(_trained));
        long version = PlanOf(Roomy, Context).OfAdapter(Jobs.Request("j").Method!).Bytes;
        EngineStatistics after = await FullAsync(engine, blocks - ExtentsOf(version));
        Assert.That(after.KvBlocksTotal, Is.EqualTo(blocks - ExtentsOf(version)), "its adapter stays");
        await engine.Adapters.UnloadAsync("j").Soon();
        after = await FullAsync(engine);
        Assert.That((after.KvBlocksTotal, after.DeviceBytes), Is.EqualTo((blocks, EngineBytes(blocks))));
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(_answers));
    }

    [Test]
    public async Task Job_BelowTheFloor_IsRefusedWithTheTableAndSamplesThatFit([Values] bool keepsMore)
    {
        int floor = keepsMore ? 3 * Context / 16 : Context / 16;
        CoServingOptions tight = Roomy with
        {
            KvCacheTokensMin = keepsMore ? 16 * floor : null,
            DeviceBytesMax = EngineBytes(floor) + NeedsOf(31),
        };
        await using CoServingEngine engine = await _model.StartAsync(tight);
        long before = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        string message = (await engine.StartFinetuningAsync(Jobs.Request("j")).FaultAsync())!.Message;
        Assert.That(message, Does.Contain("does not fit").And.Contain("saved activations").And.Contain("optimizer state"));
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(before));
        int tokens = NumberIn(message, SamplesThatFit());
        Assert.That(tokens, Is.EqualTo(31));
        FinetuningRequest fitting = Jobs.Request("j") with { SampleTokensMax = tokens };
        FinetuningJob job = await engine.StartFinetuningAsync(fitting).Soon();
        Assert.That(job.SkippedSamples, Is.EqualTo(1));
        await job.Completion.Soon();
        FinetuningRequest larger = Jobs.Request("k") with { Dataset = Jobs.Dataset(1, tokens + 1) };
        await engine.Adapters.UnloadAsync("j").Soon();
        Assert.That(await engine.StartFinetuningAsync(larger).FaultAsync(), Is.TypeOf<RequestRejectedException>());
    }

    [Test]
    public async Task Job_EndedInAnyWay_GivesTheKvCacheBack([Values("cancelled", "failed")] string end)
    {
        int blocks = (Context / 16) + ExtentsOf(NeedsOf(40));
        await using CoServingEngine engine = await _model.StartAsync(
            Roomy with { KvCacheTokens = 16 * blocks, DeviceBytesMax = EngineBytes(blocks) });
        FinetuningRequest request = Jobs.Request("j") with { Epochs = 9000 };
        if (end == "failed")
        {
            var lora = new LoraConfig { Rank = 2, TargetModules = ["v_proj", "down_proj"] };
            await engine.Adapters.LoadAsync("j", _model.WriteAdapter("overflow", lora, seed: 1, deviation: 1e20f)).Soon();
            request = request with { Method = null };
        }

        FinetuningJob job = await engine.StartFinetuningAsync(request).Soon();
        if (end == "cancelled")
        {
            await job.CancelAsync().Soon();
        }

        Assert.That(await job.Completion.FaultAsync(), Is.Not.Null);
        await engine.Adapters.UnloadAsync("j").Soon();
        Assert.That((await FullAsync(engine)).DeviceBytes, Is.EqualTo(EngineBytes(blocks)));
    }

    [Test]
    public async Task Pause_InTheForwardPhase_GivesArenasBackAndChangesNoBit()
    {
        int blocks = (Context / 16) + ExtentsOf(NeedsOf(40));
        using var gate = new StepGate("FusedLinearCrossEntropy", 2);
        CoServingOptions tight = Roomy with
        {
            KvCacheTokens = 16 * blocks,
            DeviceBytesMax = EngineBytes(blocks),
            TokensPerStepMax = 32,

            // A few tokens a step, as the guess for an unmeasured machine has it: the gate stands in the middle of a sample.
            IdleStepMax = TimeSpan.FromMicroseconds(1),
            ProfilingTimeMax = TimeSpan.Zero,
        };
        await using CoServingEngine engine = await _model.StartAsync(tight, gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        await gate.ReachedAsync();
        Task paused = job.PauseAsync();
        gate.Open();
        await paused.Soon();
        long kept = JobTableOf(40).Bytes - JobTableOf(40).Of(MemoryUse.Arenas);
        int lent = ExtentsOf(kept + PlanOf(Roomy, Context).OfAdapter(Jobs.Request("j").Method!).Bytes);
        EngineStatistics idle = await FullAsync(engine, blocks - lent);
        Assert.That((idle.JobBytes, idle.KvBlocksTotal), Is.EqualTo((kept, blocks - lent)));
        Assert.That(idle.TokensTrained, Is.Zero, "what starts over was not done");

        // Others use what it gave back; then it takes that from them.
        Task<string[]> answers = engine.AskTogetherAsync(_requests);
        gate.Arm();
        await job.ResumeAsync().Soon();
        Task<EngineStatistics> asked = engine.GetStatisticsAsync();
        gate.Open();
        EngineStatistics resumed = await asked.Soon();
        Assert.That(resumed.JobBytes, Is.EqualTo(JobTableOf(40).Bytes));
        Assert.That(resumed.KvBlocksTotal, Is.LessThan(idle.KvBlocksTotal));
        Assert.That(await answers, Is.EqualTo(_answers));
        FinetuningProgress end = await job.Completion.Soon();
        Assert.That(end.TokensDone, Is.EqualTo(2 * 127));
        Assert.That(await Jobs.WeightsAsync(engine, "j", _model["paused"]), Jobs.SameAs(_trained));
    }

    [Test]
    public async Task Pause_InTheBackwardPhase_KeepsItsArenas()
    {
        using var gate = new StepGate("AttentionBackward", 3);
        await using CoServingEngine engine = await _model.StartAsync(
            Roomy with { IdleStepMax = TimeSpan.FromMicroseconds(1) }, gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        await gate.ReachedAsync();
        Task paused = job.PauseAsync();
        gate.Open();
        await paused.Soon();
        Assert.That((await engine.GetStatisticsAsync().Soon()).JobBytes, Is.EqualTo(JobTableOf(40).Bytes));
        await job.ResumeAsync().Soon();
        await job.Completion.Soon();
        Assert.That(await Jobs.WeightsAsync(engine, "j", _model["kept"]), Jobs.SameAs(_trained));
    }

    [Test]
    public async Task Resume_WithoutRoom_IsRefusedAndTheJobStaysPaused()
    {
        // Room for one job in work, and a second that sleeps.
        MemoryPlan plan = PlanOf(Roomy, Context);
        long asleep = JobTableOf(40).Bytes - JobTableOf(40).Of(MemoryUse.Arenas) + plan.OfAdapter(Jobs.Request("j").Method!).Bytes;
        using var gate = new StepGate("FusedLinearCrossEntropy", 2);
        await using CoServingEngine engine = await _model.StartAsync(
            Roomy with
            {
                DeviceBytesMax = EngineBytes(Context / 16) + NeedsOf(40) + asleep,

                // As above, a few tokens a step: what is paused is in the middle of its forward pass.
                IdleStepMax = TimeSpan.FromMicroseconds(1),
                ProfilingTimeMax = TimeSpan.Zero,
            },
            gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        await gate.ReachedAsync();
        Task paused = job.PauseAsync();
        gate.Open();
        await paused.Soon();
        FinetuningJob other = await engine.StartFinetuningAsync(Jobs.Request("other", seed: 2) with { Epochs = 9000 }).Soon();
        Exception? refused = await job.ResumeAsync().FaultAsync();
        Assert.That(refused, Is.TypeOf<RequestRejectedException>().With.Message.Contains("stays paused"));
        Assert.That(refused!.Message, Does.Contain("saved activations").And.Not.Contain("optimizer state"));
        Assert.That(job.Latest.Status, Is.EqualTo(FinetuningStatus.Paused));
        await other.CancelAsync().Soon();
        gate.Arm(); // The few steps that are left may be over before this thread looks.
        await job.ResumeAsync().Soon();
        await gate.ReachedAsync();
        Task again = job.ResumeAsync(); // A job that runs goes on running.
        Assert.That(job.Latest.Status, Is.EqualTo(FinetuningStatus.Running));
        gate.Open();
        await again.Soon();
        await job.Completion.Soon();
        Assert.That(await Jobs.WeightsAsync(engine, "j", _model["refused"]), Jobs.SameAs(_trained));
    }

    [Test]
    public async Task Adapters_WithoutRoom_TakeExtentsAndAreRefusedAtTheFloor()
    {
        var lora = new LoraConfig { Rank = 20, TargetModules = PeftConfig.AllModules };
        long version = PlanOf(Roomy, Context).OfAdapter(lora).Bytes;
        int blocks = (Context / 16) + ExtentsOf(version);
        await using CoServingEngine engine = await _model.StartAsync(
            Roomy with { KvCacheTokens = 16 * blocks, DeviceBytesMax = EngineBytes(blocks) });
        await engine.Adapters.CreateAsync("a", lora).Soon();
        Assert.That((await engine.GetStatisticsAsync().Soon()).KvBlocksTotal, Is.EqualTo(Context / 16));
        Exception? second = await engine.Adapters.CreateAsync("b", lora).FaultAsync();
        Assert.That(second, Is.TypeOf<RequestRejectedException>().With.Message.Contains("'b' does not fit"));
        await engine.Adapters.SaveAsync("a", _model["saved a"]).Soon();
        Exception? loaded = await engine.Adapters.LoadAsync("c", _model["saved a"]).FaultAsync();
        Assert.That(loaded, Is.TypeOf<RequestRejectedException>().With.Message.Contains("adapter weights"));
        Assert.That((await engine.Adapters.ListAsync().Soon()).Select(a => a.Name), Is.EqualTo(new[] { "a" }));
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(_answers));
        await engine.Adapters.UnloadAsync("a").Soon();
        Assert.That((await FullAsync(engine)).KvBlocksTotal, Is.EqualTo(blocks));
    }

    [Test]
    public async Task Versions_WithoutRoom_AreLeftOutButForTheLast()
    {
        // A request on the first version keeps it; a second beside it would not fit.
        long bytes = EngineBytes(Context / 16) + NeedsOf(40);
        using var gate = new StepGate("Logits", 1);
        await using CoServingEngine engine = await _model.StartAsync(
            Roomy with { DeviceBytesMax = bytes }, gate.Device());
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { PublishEverySteps = 1 }).Soon();
        Exception? now = await job.PublishAsync().FaultAsync();
        Assert.That(now, Is.TypeOf<RequestRejectedException>().With.Message.Contains("does not fit").Or.Message.Contains("ended"));
        await job.Completion.Soon();
        AdapterInfo published = (await engine.Adapters.ListAsync().Soon()).Single();
        Assert.That(published.Version, Is.EqualTo(2));
        Assert.That(await Jobs.WeightsAsync(engine, "j", _model["last"]), Jobs.SameAs(_trained));
    }

    [Test]
    public async Task Growth_OnAMachineWithLessMemory_IsLeftForLater()
    {
        int blocks = (Context / 16) + ExtentsOf(NeedsOf(40));
        int resizes = 0;
        int failures = 2;
        await using CoServingEngine engine = await _model.StartAsync(
            Roomy with { KvCacheTokens = 16 * blocks, DeviceBytesMax = EngineBytes(blocks) },
            new ProbedDevice(name =>
            {
                // The first makes room for the job, the second would grow the cache again.
                if (name == "ResizeKvCache" && ++resizes > 1 && failures-- > 0)
                {
                    throw new InsufficientMemoryException("No more.");
                }
            }));
        await engine.TrainAsync(Jobs.Request("j"));
        Assert.That((await engine.GetStatisticsAsync().Soon()).KvBlocksTotal, Is.LessThan(blocks));
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(_answers));
        await engine.Adapters.UnloadAsync("j").Soon();
        Assert.That((await engine.GetStatisticsAsync().Soon()).KvBlocksTotal, Is.LessThan(blocks));
        await engine.Adapters.CreateAsync("a", new LoraConfig()).Soon();
        await engine.Adapters.UnloadAsync("a").Soon();
        Assert.That((await FullAsync(engine)).KvBlocksTotal, Is.EqualTo(blocks));
    }

    [Test]
    public async Task Device_FailsWhileTheCacheShrinks_FaultsEveryWaiterAndFreesEverything()
    {
        int blocks = (Context / 16) + ExtentsOf(NeedsOf(40));
        CoServingEngine engine = await _model.StartAsync(
            Roomy with { KvCacheTokens = 16 * blocks, DeviceBytesMax = EngineBytes(blocks) },
            new ProbedDevice(name =>
            {
                if (name == "ResizeKvCache")
                {
                    throw new InvalidOperationException("The device is gone.");
                }
            }));
        Task<string[]> answers = engine.AskTogetherAsync(_requests);
        Assert.That(await engine.StartFinetuningAsync(Jobs.Request("j")).FaultAsync(), Is.TypeOf<EngineFaultedException>());
        Assert.That(await answers.FaultAsync(), Is.Null.Or.TypeOf<EngineFaultedException>());
        await engine.DisposeAsync().Soon();
        Assert.That(engine.Backend.AllocatedBytes, Is.Zero);
    }

    // The loop has the message when this returns: nothing is left to do on the caller's side.
    private static Task<FinetuningJob> StartNow(CoServingEngine engine, FinetuningRequest request)
    {
        var builder = new SampleBuilder(engine.Config, null, null, Context, refuseBad: false);
        BuiltSamples samples = builder.Build(request.Dataset, CancellationToken.None);
        return engine.CallAsync(
            loop => loop.Jobs.Start(new EngineInbox(1), request, samples, loop.Now), CancellationToken.None);
    }

    private static async Task<EngineStatistics> FullAsync(CoServingEngine engine, int? blocks = null)
    {
        EngineStatistics statistics = await engine.GetStatisticsAsync().Soon();
        for (int i = 0; i < 100 && statistics.KvBlocksTotal < (blocks ?? statistics.KvBlocksMax); i++)
        {
            statistics = await engine.GetStatisticsAsync().Soon();
        }

        return statistics;
    }

    private static int NumberIn(string message, Regex pattern)
    {
        Match match = pattern.Match(message);
        Assert.That(match.Success, message);
        return int.Parse(match.Groups[1].Value, CultureInfo.InvariantCulture);
    }

    private MemoryPlan PlanOf(CoServingOptions options, int positions) =>
        EngineMemory.PlanOf(_model.Config, _compiler.Forward, _sizes, options, positions);

    private long EngineBytes(int kvBlocks) => PlanOf(Roomy, Context).OfEngine(_ => DType.F32, kvBlocks).Bytes;

    private TrainingProgram JobProgram => _compiler.CompileTraining(
        DecoderBuilder.BuildTraining(_model.Config, PeftAdapter.NetworksOf(Jobs.Request("j").Method!, _model.Config)));

    private MemoryTable JobTableOf(int tokens) =>
        PlanOf(Roomy, Context).OfJob(JobProgram, Jobs.Request("j").Method!, moments: 2, tokens);

    // What a job takes on top where nobody needs it: room for the sample that goes forward beside the one that goes backward.
    private long SecondSampleOf(int tokens) => PlanOf(Roomy, Context).OfSample(JobProgram, tokens).Bytes;

    // The job, the first version of its adapter, and scratch memory of the first job.
    private long NeedsOf(int tokens)
    {
        MemoryPlan plan = PlanOf(Roomy, Context);
        return JobTableOf(tokens).Bytes + plan.OfAdapter(Jobs.Request("j").Method!).Bytes +
            plan.ScratchBytes(trains: true) - plan.ScratchBytes(trains: false);
    }

    // Blocks of whole extents that hold so many bytes.
    private int ExtentsOf(long bytes)
    {
        long extent = PlanOf(Roomy, Context).KvBytes(Extent);
        return (int)((bytes + extent - 1) / extent) * Extent;
    }

    [GeneratedRegex(@"context of at most (\d+) tokens")]
    private static partial Regex ContextThatFits();

    [GeneratedRegex(@"Samples of at most (\d+) tokens")]
    private static partial Regex SamplesThatFit();
}
