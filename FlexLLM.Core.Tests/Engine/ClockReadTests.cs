using FlexLLM.Backends;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>
/// A GPU returns from calls before their work is done. Whoever reads a clock then, measures nothing: the profile, the latency model and
/// the items that a late step leaves out would all be wrong there, and no test on a CPU would show it.
/// </summary>
[TestFixture]
internal sealed class ClockReadTests
{
    private static readonly HashSet<string> Work =
    [
        nameof(IComputeBackend.Linear), nameof(IComputeBackend.Attention), nameof(IComputeBackend.AttentionBackward),
        nameof(IComputeBackend.LoraBypassBackward), nameof(IComputeBackend.FusedLinearCrossEntropy), nameof(IComputeBackend.Logits),
        nameof(IComputeBackend.AdamWStep),
    ];

    private static readonly string[] Waiting =
        [nameof(IComputeBackend.Download), nameof(IComputeBackend.ArgMax), nameof(IComputeBackend.Largest)];

    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Llama);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Engine_WithRequestsAndAJob_ReadsNoClockWhileTheDeviceHasWork()
    {
        (int reads, int tooEarly) = await RunAsync([.. Waiting, nameof(IComputeBackend.Synchronize)]);
        Assert.That(reads, Is.GreaterThan(100));
        Assert.That(tooEarly, Is.Zero);
    }

    // The rig: only what the host reads waits by itself, and not every step ends with one.
    [Test]
    public async Task Engine_OnADeviceThatNeverSynchronizes_ReadsTheClockTooEarly()
    {
        (_, int tooEarly) = await RunAsync(Waiting);
        Assert.That(tooEarly, Is.GreaterThan(0));
    }

    // A loss that is read when it is computed has the host wait for the device before it gives it the rest of the batch.
    [TestCase(nameof(IComputeBackend.Synchronize), false)]
    [TestCase(nameof(IComputeBackend.LoraBypassBackward), true, Description = "the rig: no batch ends with one")]
    public async Task Engine_WithAJob_ReadsLossesWhenTheBatchIsDone(string endOfBatch, bool isEarly)
    {
        using var hasLoss = new ThreadLocal<bool>();
        (int losses, int early) = (0, 0);
        var device = new ProbedDevice(operation =>
        {
            losses += operation == nameof(IComputeBackend.FusedLinearCrossEntropy) ? 1 : 0;
            early += hasLoss.Value && operation == nameof(IComputeBackend.Download) ? 1 : 0;
            hasLoss.Value = operation == nameof(IComputeBackend.FusedLinearCrossEntropy) || (hasLoss.Value && operation != endOfBatch);
        });
        await using (CoServingEngine engine = await _model.StartAsync(new CoServingOptions(), device))
        {
            FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("job")).Soon();
            await job.Completion.Soon();
        }

        Assert.That(losses, Is.Positive);
        Assert.That(early > 0, Is.EqualTo(isEarly));
    }

    // How often a thread that calls the device read the clock, and how often with work under way.
    private async Task<(int Reads, int TooEarly)> RunAsync(params string[] waiting)
    {
        using var busy = new ThreadLocal<bool?>();
        int reads = 0;
        int tooEarly = 0;
        var device = new ProbedDevice(operation =>
        {
            bool works = Work.Contains(operation);
            busy.Value = works || waiting.Contains(operation) ? works : busy.Value ?? false;
        });
        var clock = new WatchedClock(() =>
        {
            Interlocked.Add(ref reads, busy.Value is null ? 0 : 1);
            Interlocked.Add(ref tooEarly, busy.Value is true ? 1 : 0);
        });
        await using (CoServingEngine engine = await _model.StartAsync(new CoServingOptions { Clock = clock }, device))
        {
            FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("job")).Soon();
            await Task.WhenAll(Answers.Mixed(6, maxTokens: 12).Select(r => engine.AskAsync(r)));
            await job.Completion.Soon();
        }

        return (reads, tooEarly);
    }

    private sealed class WatchedClock(Action onRead) : TimeProvider
    {
        public override long GetTimestamp()
        {
            onRead();
            return base.GetTimestamp();
        }
    }
}
