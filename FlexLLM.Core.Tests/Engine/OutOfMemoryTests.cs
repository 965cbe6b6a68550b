using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>
/// Memory that runs out inside an operation costs the job or the request that needed most, or blocks of the KV cache; the others get
/// the answers that they would have had.
/// </summary>
[TestFixture]
internal sealed class OutOfMemoryTests
{
    private readonly GenerationRequest[] _requests = Answers.Mixed(4, maxTokens: 40);
    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Qwen3);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [TestCase("FusedLinearCrossEntropy", 2)]
    [TestCase("AttentionBackward", 3)]
    [TestCase("LoraBypassBackward", 2)]
    [TestCase("AdamWStep", 2)]
    public async Task Operation_OfAJob_FailsThatJobAlone(string operation, int call)
    {
        int left = -1;
        await using CoServingEngine engine = await StartAsync(name => name == operation && Interlocked.Decrement(ref left) == 0);
        string[] expected = await engine.AskAloneAsync(_requests);
        long before = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        Volatile.Write(ref left, call);
        Task<string[]> beside = engine.AskTogetherAsync(_requests);
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { Epochs = 50 }).Soon();
        Assert.That(await job.Completion.FaultAsync(), Is.InstanceOf<OutOfMemoryException>().With.Message.Contains("ran out of memory"));
        Assert.That(job.Latest.Status, Is.EqualTo(FinetuningStatus.Failed));
        Assert.That(await beside.Soon(), Is.EqualTo(expected));
        await engine.Adapters.UnloadAsync("j").Soon();
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(before));
        await engine.TrainAsync(Jobs.Request("j"));
    }

    // A GPU's allocator gives the room to whatever is allocated next.
    [Test]
    public async Task ReserveScratch_OfAnEngineAndAJob_ComesAfterWhatLivesLonger()
    {
        string[] lives = ["Allocate", "CreateKvCache", "CreateFactor"];
        var calls = new List<string>();
        await using CoServingEngine engine = await StartAsync(name =>
        {
            lock (calls)
            {
                calls.Add(name);
            }

            return false;
        });
        Assert.That(calls.FindLastIndex(lives.Contains), Is.InRange(0, calls.LastIndexOf("ReserveScratch")));
        calls.Clear();
        await engine.TrainAsync(Jobs.Request("j"));
        string[] atStart = [.. calls.TakeWhile(name => name != "Attention")];
        Assert.That(Array.FindLastIndex(atStart, lives.Contains), Is.InRange(0, Array.LastIndexOf(atStart, "ReserveScratch")));
    }

    [Test]
    public async Task ReserveScratch_ThatFailsForAJob_RefusesItAndLeavesNothing()
    {
        int left = -1;
        await using CoServingEngine engine =
            await StartAsync(name => name == "ReserveScratch" && Interlocked.Decrement(ref left) == 0);
        long before = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        Volatile.Write(ref left, 1);
        Assert.That(
            await engine.StartFinetuningAsync(Jobs.Request("j")).FaultAsync(),
            Is.InstanceOf<OutOfMemoryException>().Or.InstanceOf<FlexLlmException>());
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(before));
        await engine.TrainAsync(Jobs.Request("j"));
    }

    [Test]
    public async Task ReserveScratch_ThatFailsForAPausedJob_LeavesItPaused()
    {
        int left = -1;
        await using CoServingEngine engine =
            await StartAsync(name => name == "ReserveScratch" && Interlocked.Decrement(ref left) == 0);
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { Epochs = 400 }).Soon();
        long before;
        do
        {
            // Only in the forward phase a pause gives something back.
            await job.PauseAsync().Soon();
            before = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
            Volatile.Write(ref left, 1);
            if (await job.ResumeAsync().FaultAsync() is Exception fault)
            {
                Assert.That(fault, Is.InstanceOf<OutOfMemoryException>().Or.InstanceOf<FlexLlmException>());
                break;
            }

            Volatile.Write(ref left, -1);
        }
        while (job.Latest.Status == FinetuningStatus.Running);
        Assert.That(job.Latest.Status, Is.EqualTo(FinetuningStatus.Paused));
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(before));
        await job.ResumeAsync().Soon();
        await job.Completion.Soon();
    }

    [Test]
    public async Task Operation_OfRequestsOnce_TakesAnExtentOfTheCacheAndNoAnswer()
    {
        int left = -1;
        await using CoServingEngine engine = await StartAsync(name => name == "Attention" && Interlocked.Decrement(ref left) == 0);
        string[] expected = await engine.AskAloneAsync(_requests);
        Volatile.Write(ref left, 9);
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(expected));
        EngineStatistics statistics = await engine.GetStatisticsAsync().Soon();
        Assert.That(left, Is.LessThan(0), "Control: it failed once.");
        Assert.That(statistics.KvBlocksTotal, Is.LessThan(statistics.KvBlocksMax));
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(expected));
    }

    [Test]
    public async Task Operation_OfARequestAlways_EndsItWithTheReasonAndTheEngineLives()
    {
        bool isFull = false;
        await using CoServingEngine engine = await StartAsync(name => name == "Attention" && Volatile.Read(ref isFull));
        string[] expected = await engine.AskAloneAsync(_requests);
        Volatile.Write(ref isFull, true);
        GenerationResult[] ended = await Task.WhenAll(_requests.Select(request => engine.CompleteAsync(request))).Soon();
        Assert.That(ended.Select(result => result.FinishReason), Is.All.EqualTo(FinishReason.Error));
        Assert.That(ended.Select(result => result.FinishDetail), Is.All.Contains("ran out of memory"));
        Volatile.Write(ref isFull, false);
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(expected));
        EngineStatistics statistics = await engine.GetStatisticsAsync().Soon();
        Assert.That(statistics.RequestsActive, Is.Zero);
    }

    [Test]
    public async Task Cache_ThatCannotEvenShrink_StaysAsItWas()
    {
        bool isFull = false;
        await using CoServingEngine engine = await StartAsync(name => name is "Attention" or "ResizeKvCache" && Volatile.Read(ref isFull));
        string expected = await engine.AskAsync(_requests[0]);
        Volatile.Write(ref isFull, true);
        GenerationResult ended = await engine.CompleteAsync(_requests[0]).Soon();
        Assert.That(ended.FinishReason, Is.EqualTo(FinishReason.Error));
        Volatile.Write(ref isFull, false);
        EngineStatistics statistics = await engine.GetStatisticsAsync().Soon();
        Assert.That(statistics.KvBlocksTotal, Is.EqualTo(statistics.KvBlocksMax));
        Assert.That(await engine.AskAsync(_requests[0]), Is.EqualTo(expected));
    }

    private Task<CoServingEngine> StartAsync(Func<string, bool> isFull) => _model.StartAsync(
        new CoServingOptions { TokensPerStepMax = 32, KvCacheTokens = 4096 },
        new ProbedDevice(name =>
        {
            if (isFull(name))
            {
                throw new InsufficientMemoryException("No more.");
            }
        }));
}
