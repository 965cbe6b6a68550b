using FlexLLM.Scheduling;
using FsCheck.Fluent;
using NUnit.Framework;

namespace FlexLLM.Tests.Scheduling;

/// <summary>
/// A flood that never ends, and one request that it would keep out for ever: it is answered within what the limits promise.
/// Each property has a control, where the limit that it rests on is taken away.
/// </summary>
[TestFixture]
[Parallelizable]
internal sealed class StarvationTests
{
    private const int Places = 4;
    private const int StepsPerSecond = 100;
    private const int BlocksMany = 10_000;
    private static readonly TimeSpan Never = TimeSpan.FromHours(1);

    private static readonly StepLimits Limits = new()
    {
        TokensPerStepMax = 256,
        SequencesMax = Places,
        AgeingPerPriority = TimeSpan.FromSeconds(1),
    };

    // A request of the flood has its place for its prompt, with three others' in the way, and for its answer.
    private const int StepsOfOne = Places + FloodRun.AnswerMax;

    // What waited before the victim, what runs, and the victim itself.
    private const int StepsToDrain = ((FloodRun.Backlog / Places) + 2) * StepsOfOne;

    [Test]
    public void LowPriority_HighPriorityForEver_IsAnsweredOnceItsWaitingCountsMore() => ForSeeds(seed =>
    {
        int levels = 1 + (int)(seed % 3);
        Assert.That(StepsOf(levels, Limits, seed), Is.Not.Null);
        Assert.That(StepsOf(levels, Limits, seed), Is.GreaterThan(levels * StepsPerSecond / 2), "else priority means nothing");
    });

    [Test]
    public void LowPriority_Control_WithoutAgeingIsStarved() =>
        Assert.That(StepsOf(1, Limits with { AgeingPerPriority = Never }, seed: 1), Is.Null);

    [Test]
    public void UnknownPrompt_SharedPrefixForEver_IsAnsweredAfterTheCredit() =>
        ForSeeds(seed => Assert.That(StepsBesidePrefix(Limits, seed), Is.Not.Null));

    [Test]
    public void UnknownPrompt_Control_EndlessCreditStarvesIt() =>
        Assert.That(StepsBesidePrefix(Limits with { PrefixCreditMax = Never }, seed: 1), Is.Null);

    [Test]
    public void LargePrompt_SmallOnesForEverInAFullCache_GetsItsBlocks() =>
        ForSeeds(seed => Assert.That(StepsOfLarge(Limits, seed), Is.Not.Null));

    [Test]
    public void LargePrompt_Control_PassedForEverIsStarved() => Assert.That(
        StepsOfLarge(Limits with { SkipAheadWaitMax = Never, SkipAheadMax = int.MaxValue }, seed: 1), Is.Null);

    [Test]
    public void LightTenant_HeavyTenantFloods_IsNotBehindItsQueue() =>
        ForSeeds(seed => Assert.That(StepsBesideHeavyTenant(hidesTenants: false, seed), Is.Not.Null));

    [Test]
    public void LightTenant_Control_OneQueueForAllIsTooLate() =>
        Assert.That(StepsBesideHeavyTenant(hidesTenants: true, seed: 1), Is.Null);

    // Theorem 4.4 of Sheng et al., OSDI'24: twice the most that all places can be given before one is free again, here per weight.
    [Test]
    public void Tenants_BothBacklogged_GetTokensByWeight() => ForSeeds(seed =>
    {
        FloodRun run = TwoTenants(hidesTenants: false, seed);
        Assert.That(run.Served[0] - (run.Served[1] / 3.0), Is.InRange(-GapMax, GapMax));
        Assert.That(run.Served[1], Is.GreaterThan(5 * GapMax), "else the bound says nothing");
    });

    [Test]
    public void Tenants_Control_OneQueueForAllIgnoresWeights()
    {
        FloodRun run = TwoTenants(hidesTenants: true, seed: 1);
        Assert.That(run.Served[0] - (run.Served[1] / 3.0), Is.GreaterThan(GapMax));
    }

    private const double GapMax = 2.0 * Places * (FloodRun.PromptMax + (2.0 * FloodRun.AnswerMax));

    private static void ForSeeds(Action<ulong> holds) =>
        FsCheck.Check.One(Repeatable.Many(seed: 7, count: 20), Prop.ForAll<int>(seed => holds((ulong)Math.Abs((long)seed))));

    // Whoever comes after the victim by as much waiting as the levels are worth comes after it in the order.
    private static int? StepsOf(int levels, StepLimits limits, ulong seed) =>
        new FloodRun(limits, BlocksMany, seed, hidesTenants: true) { Flood = s => s with { Priority = levels } }
            .StepsToAnswer(40, (levels * StepsPerSecond) + StepsToDrain);

    // Three of the four blocks of each are in the cache already.
    private static int? StepsBesidePrefix(StepLimits limits, ulong seed) =>
        new FloodRun(limits, BlocksMany, seed, hidesTenants: true) { Flood = s => s with { TokensComputed = 48, BlocksHeld = 3 } }
            .StepsToAnswer(40, StepsPerSecond + StepsToDrain);

    // It needs three quarters of a cache that the small ones fill.
    private static int? StepsOfLarge(StepLimits limits, ulong seed)
    {
        const int Blocks = 24;
        int bound = (int)(Limits.SkipAheadWaitMax.TotalSeconds * StepsPerSecond) + StepsToDrain;
        return new FloodRun(limits with { GrowthHorizon = 0 }, Blocks, seed, hidesTenants: true)
            .StepsToAnswer(18 * 16, bound);
    }

    // The second place that becomes free is its own: ties go to who came first, then the heavy tenant has had more.
    private static int? StepsBesideHeavyTenant(bool hidesTenants, ulong seed) =>
        new FloodRun(Limits, BlocksMany, seed, hidesTenants) { Flooding = 10 * FloodRun.Backlog }
            .StepsToAnswer(40, 3 * StepsOfOne);

    private static FloodRun TwoTenants(bool hidesTenants, ulong seed)
    {
        var run = new FloodRun(Limits, BlocksMany, seed, hidesTenants) { Tenants = 2 };
        run.Run(steps: 600);
        return run;
    }
}
