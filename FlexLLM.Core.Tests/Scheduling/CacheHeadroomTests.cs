using FlexLLM.Scheduling;
using NUnit.Framework;
using static FlexLLM.Tests.Scheduling.Snapshots;

namespace FlexLLM.Tests.Scheduling;

/// <summary>Finetuning ends where the KV cache fills up: of 1,000 blocks one request holds those that are not free.</summary>
[TestFixture]
internal sealed class CacheHeadroomTests
{
    private static readonly JobSnapshot Job = new() { Id = new(1), Weight = 1.0, Phase = JobPhase.Forward, SampleTokens = 5_000 };

    [TestCase(900, 1.0)]
    [TestCase(200, 1.0)]
    [TestCase(175, 0.5)]
    [TestCase(150, 0.0)]
    [TestCase(1, 0.0)]
    public void Plan_BlocksFree_FinetuningGetsThatShareOfTheSlack(int blocksFree, double share)
    {
        TimeSpan slack = BudgetWith(blocksFree, new StepLimits { FreeBlocksShare = 0.0, FreeBlocksMin = 0.0 }, out TimeSpan own) - own;

        TimeSpan budget = BudgetWith(blocksFree, new StepLimits(), out _);

        Assert.That(slack, Is.GreaterThan(Ms(10)), "else there is nothing to share");
        Assert.That((budget - own) / slack, Is.EqualTo(share).Within(0.01));
    }

    private static TimeSpan BudgetWith(int blocksFree, StepLimits limits, out TimeSpan own)
    {
        SequenceSnapshot request = Decoding(1, (1_000 - blocksFree) * 16) with { TokensMax = (1_000 - blocksFree) * 16 + 1 };
        EngineSnapshot now = Snapshots.Of([request], totalBlocks: 1_000) with { Jobs = [Job] };
        StepPlan plan = HybridTokenScheduler.Plan(now, limits, Latency);
        own = Latency.Predict(plan.Features.WithoutFinetuning());
        Assert.That(plan.HasFinetuning, Is.EqualTo(plan.Budget > own));
        return plan.Budget;
    }
}
