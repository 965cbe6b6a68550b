using FlexLLM.Scheduling;
using NUnit.Framework;
using static FlexLLM.Tests.Scheduling.Snapshots;

namespace FlexLLM.Tests.Scheduling;

/// <summary>Finetuning ends where the KV cache fills up: of 2,000 blocks requests hold those that are not free.</summary>
[TestFixture]
[Parallelizable]
internal sealed class CacheHeadroomTests
{
    private const int Blocks = 2_000;

    private static readonly JobSnapshot Job = new() { Id = new(1), Weight = 1.0, Phase = JobPhase.Forward, SampleTokens = 5_000 };

    // Fifty requests, so that 0.02 are left to it in any case.
    [TestCase(1_800, 1.0)]
    [TestCase(400, 1.0)]
    [TestCase(350, 0.5)]
    [TestCase(300, 0.02)]
    [TestCase(100, 0.02)]
    public void Plan_BlocksFree_FinetuningGetsThatShareOfTheSlack(int blocksFree, double share) =>
        Assert.That(ShareOfSlack(requests: 50, blocksFree), Is.EqualTo(share).Within(0.01));

    // A long answer that is alone must not stop a job for as long as it takes.
    [TestCase(1, 1.0)]
    [TestCase(2, 0.5)]
    [TestCase(5, 0.2)]
    public void Plan_FewRequestsFillTheCache_FinetuningGoesOn(int requests, double share) =>
        Assert.That(ShareOfSlack(requests, blocksFree: 100), Is.EqualTo(share).Within(0.01));

    [TestCase(1)]
    [TestCase(5)]
    public void Plan_OneMoreWaitsForTheirBlocks_FinetuningEnds(int requests) =>
        Assert.That(SlackOf(Requests(requests, blocksFree: 100, Prompt(1_000, 16 * 150)), new StepLimits()), Is.EqualTo(TimeSpan.Zero));

    private static double ShareOfSlack(int requests, int blocksFree)
    {
        EngineSnapshot now = Requests(requests, blocksFree);
        TimeSpan slack = SlackOf(now, new StepLimits { FreeBlocksShare = 0.0, FreeBlocksMin = 0.0 });
        Assert.That(slack, Is.GreaterThan(Ms(10)), "else there is nothing to share");
        return SlackOf(now, new StepLimits()) / slack;
    }

    private static EngineSnapshot Requests(int count, int blocksFree, params SequenceSnapshot[] waiting)
    {
        int context = (Blocks - blocksFree) / count * 16;
        SequenceSnapshot[] running =
            [.. Enumerable.Range(1, count).Select(id => Decoding(id, context) with { TokensMax = context + 1 })];
        return Snapshots.Of([.. running, .. waiting], Blocks) with { Jobs = [Job] };
    }

    private static TimeSpan SlackOf(EngineSnapshot now, StepLimits limits)
    {
        StepPlan plan = HybridTokenScheduler.Plan(now, limits, Latency);
        Assert.That(plan.Admissions, Is.Empty);
        TimeSpan slack = plan.Budget - Latency.Predict(plan.Features.WithoutFinetuning());
        return slack > TimeSpan.Zero ? slack : TimeSpan.Zero;
    }
}
