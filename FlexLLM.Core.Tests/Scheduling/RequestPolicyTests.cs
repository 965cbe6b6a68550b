using FlexLLM.Engine;
using FlexLLM.Scheduling;
using NUnit.Framework;
using static FlexLLM.Tests.Scheduling.Snapshots;

namespace FlexLLM.Tests.Scheduling;

/// <summary>Tenants, inter-token targets, victims, and what a plan costs.</summary>
[TestFixture]
[Parallelizable]
internal sealed class RequestPolicyTests
{
    private static readonly StepLimits Limits = new()
    {
        TokensPerStepMax = 512,
        SequencesMax = 256,
        PromptHeldBack = 0.0,
        TpotPlanned = 1.0,
        ChunksAhead = 0,
    };

    [Test]
    public void Plan_InterTokenTarget_BoundsPromptsAndFinetuningDespiteSlack()
    {
        SequenceSnapshot ahead = Decoding(1, 40) with { TokensGenerated = 9 };
        SequenceSnapshot strict = ahead with { InterTokenTarget = Ms(20) };
        JobSnapshot job = new() { Id = new(1), Weight = 1.0, Phase = JobPhase.Forward, SampleTokens = 900 };

        Assert.That(Plan([ahead, Prompt(2, 300)], job).LatencyPredicted, Is.GreaterThan(Ms(40)));
        StepPlan plan = Plan([strict, Prompt(2, 300)], job);
        Assert.That(plan.LatencyPredicted, Is.EqualTo(Ms(20)));
        Assert.That(plan.Inference[1].Tokens, Is.EqualTo(99));
        Assert.That(Plan([strict], job).LatencyPredicted, Is.EqualTo(Ms(20)));
    }

    // Items have taken 4 of the 20 ms since the last token, then 15; a decode step takes 10.1.
    [Test]
    public void Plan_TokenSomeTimeAgo_LeavesPromptsAndWindowsWhatIsLeftUntilTheNext()
    {
        SequenceSnapshot strict = Decoding(1, 40) with { TokensGenerated = 9, InterTokenTarget = Ms(20), LastTokenTime = Ms(996) };
        JobSnapshot forward = new() { Id = new(1), Weight = 1.0, Phase = JobPhase.Forward, SampleTokens = 900 };
        JobSnapshot backward = forward with { Phase = JobPhase.Backward, RowsLeft = 900 };

        Assert.That(Plan([strict, Prompt(2, 300)], forward).Inference[1].Tokens, Is.EqualTo(59), "16 ms");
        Assert.That(Plan([strict], forward).LatencyPredicted, Is.EqualTo(Ms(16)));
        Assert.That(Plan([strict], backward).LatencyPredicted, Is.EqualTo(Ms(20)), "items come after the token");

        SequenceSnapshot late = strict with { LastTokenTime = Ms(985) };
        StepPlan plan = Plan([late, Prompt(2, 300)], backward);
        Assert.That(plan.Inference, Has.Length.EqualTo(1), "one step later there is time for the prompt");
        Assert.That(plan.HasFinetuning, Is.False, "if that does not take it again");
        SequenceSnapshot again = Prompt(2, 300) with { FirstTokenTime = Ms(900), TokensGenerated = 9 };
        Assert.That(Plan([late, again], backward).HasFinetuning, Is.False, "nor from one that lost its place");
    }

    [Test]
    public void Plan_InterTokenTargetLostAnyway_StopsNoPrompt()
    {
        StepPlan plan = Plan([Decoding(1, 40) with { InterTokenTarget = Ms(1) }, Prompt(2, 300)]);

        Assert.That(plan.Inference, Has.Length.EqualTo(2));
    }

    // A window costs 10 ms by itself and an item 4; the request saves 30 ms a step.
    [Test]
    public void Plan_WorkThatIsMostlyItsFixedCost_WaitsForALargerBudget()
    {
        LatencyModel dear = Latency with
        {
            Coefficients = Latency.Coefficients.With(LatencyTerm.ForwardWindow, 10e-3).With(LatencyTerm.BackwardItem, 4e-3),
        };
        JobSnapshot forward = new() { Id = new(1), Weight = 1.0, Phase = JobPhase.Forward, SampleTokens = 900 };
        JobSnapshot backward = forward with { Phase = JobPhase.Backward, RowsLeft = 900, AheadTokens = 900 };
        SequenceSnapshot request = Decoding(1, 40);
        SequenceSnapshot strict = request with { InterTokenTarget = Ms(45) };
        SequenceSnapshot saved = request with { TokensGenerated = 2 };

        Assert.That(PlanOf(request, forward).HasFinetuning, Is.False, "a quarter of 40 ms");
        Assert.That(PlanOf(saved, forward).HasFinetuning, Is.True, "a ninth of 90 ms");
        Assert.That(PlanOf(strict, forward).HasFinetuning, Is.True, "it will never be more");
        Assert.That(PlanOf(request, forward, stepsSince: 8).HasFinetuning, Is.True, "it has waited for long enough");
        Assert.That(PlanOf(request, forward with { SampleTokens = 20 }).HasFinetuning, Is.True, "there is no more to do at a time");
        Assert.That(PlanOf(request, backward).Backward, Is.Not.Empty, "a tenth of 40 ms");
        Assert.That(PlanOf(request, backward).Forward, Is.Empty);

        StepPlan PlanOf(SequenceSnapshot sequence, JobSnapshot job, int stepsSince = 0) => HybridTokenScheduler.Plan(
            Snapshots.Of([sequence]) with { Jobs = [job], StepsSinceFinetuning = stepsSince }, Limits, dear);
    }

    [Test]
    public void Plan_BeginningInTheCache_ComputesTheRestAndGoesFirstForAWhile()
    {
        SequenceSnapshot known = Prompt(2, 100) with { TokensComputed = 64, BlocksHeld = 4 };
        SequenceSnapshot other = Prompt(1, 90) with { ArrivalTime = Ms(500) };

        Assert.That(Plan([known, other]).Inference.Select(w => w.ToString()), Is.EqualTo(new[] { "2:64+36", "1:0+90" }));
        SequenceSnapshot older = other with { ArrivalTime = Ms(300) };
        Assert.That(Plan([known, older]).Inference.Select(w => w.Id.Value), Is.EqualTo(new long[] { 1, 2 }), "0.64 s and no more");
    }

    [Test]
    public void Plan_SharedBlocks_CountOnce()
    {
        // Each may come to 21 blocks, 10 of which are the same; of 45 blocks 10 + 3 x 11 are needed.
        SequenceSnapshot[] running =
            [.. Enumerable.Range(1, 2).Select(i => Decoding(i, 300) with { TokensMax = 330, BlocksShared = 10 })];
        SequenceSnapshot next = Prompt(3, 300) with { TokensMax = 330, TokensComputed = 160, BlocksHeld = 10, BlocksShared = 10 };

        Assert.That(Admitted(next, totalBlocks: 43), Is.EqualTo(1));
        Assert.That(Admitted(next, totalBlocks: 42), Is.Zero);
        Assert.That(Admitted(next with { TokensComputed = 0, BlocksHeld = 0, BlocksShared = 0 }, totalBlocks: 52), Is.Zero);

        int Admitted(SequenceSnapshot candidate, int totalBlocks) => HybridTokenScheduler.Plan(
            Snapshots.Of([.. running, candidate], totalBlocks) with { FreeBlocks = totalBlocks - (2 * 19) + 10 }, Limits, Latency)
            .Admissions.Length;
    }

    [Test]
    public void Plan_VictimsThatShareAll_AreAllPreempted()
    {
        // Nothing becomes free before the last of the two is gone.
        SequenceSnapshot first = Decoding(1, 32);
        SequenceSnapshot[] victims = [.. Enumerable.Range(2, 2).Select(i => Decoding(i, 32) with { BlocksShared = 2 })];
        StepPlan plan = HybridTokenScheduler.Plan(
            Snapshots.Of([first, .. victims], totalBlocks: 4) with { FreeBlocks = 0 }, Limits, Latency);

        Assert.That(plan.Preemptions.Select(id => id.Value).Order(), Is.EqualTo(new long[] { 2, 3 }));
        Assert.That(plan.Inference.Single().Id, Is.EqualTo(first.Id));
    }

    [Test]
    public void Plan_Tenants_TheLeastServedGoesFirstCountingThisPlan()
    {
        SequenceSnapshot[] waiting =
            [Prompt(1, 50), Prompt(2, 50), Prompt(3, 50) with { Tenant = 1 }, Prompt(4, 50) with { Tenant = 1 }];
        TenantSnapshot a = new() { Served = 30.0, Weight = 1.0, LastAdmission = Ms(999) };
        TenantSnapshot b = a with { Served = 0.0 };

        Assert.That(Order(waiting, a, b), Is.EqualTo(new long[] { 3, 1, 4, 2 }));
        Assert.That(Order(waiting, a, b with { Weight = 4.0 }), Is.EqualTo(new long[] { 3, 4, 1, 2 }), "half of 50 is less than 30");
        Assert.That(Order(waiting, a, a), Is.EqualTo(new long[] { 1, 3, 2, 4 }));
        Assert.That(Order(waiting), Is.EqualTo(new long[] { 1, 2, 3, 4 }), "one tenant: by arrival");
        SequenceSnapshot[] urgent = [.. waiting[..3], waiting[3] with { Priority = 1 }];
        Assert.That(Order(urgent, b, a), Is.EqualTo(new long[] { 4, 1, 2, 3 }), "priority first");

        static long[] Order(SequenceSnapshot[] sequences, params TenantSnapshot[] tenants) =>
            [.. HybridTokenScheduler.Plan(Snapshots.Of(sequences) with { Tenants = [.. tenants] }, Limits, Latency)
                .Inference.Select(w => w.Id.Value)];
    }

    [Test]
    public void Plan_TenantThatWaitedTooLong_GoesFirstOnce()
    {
        SequenceSnapshot[] waiting = [Prompt(1, 50), Prompt(2, 50) with { Tenant = 1 }, Prompt(3, 50) with { Tenant = 1 }];
        TenantSnapshot little = new() { Served = 0.0, Weight = 1.0, LastAdmission = Ms(999) };
        EngineSnapshot now = Snapshots.Of([.. waiting.Select(s => s with { ArrivalTime = Ms(s.Id.Value) })]) with
        {
            Tenants = [little, new TenantSnapshot { Served = 1e9, Weight = 1.0 }],
        };

        StepPlan plan = HybridTokenScheduler.Plan(now, Limits with { TenantWaitMax = Ms(500) }, Latency);
        Assert.That(plan.Inference.Select(w => w.Id.Value), Is.EqualTo(new long[] { 2, 1, 3 }));
    }

    [Test]
    public void Plan_Victim_IsTheOneWithLessToComputeAgain()
    {
        // The second has 5 ms more slack and 96 tokens, 9.6 ms, more to compute again; none has a block to grow into.
        SequenceSnapshot[] full = [Decoding(1, 16), Decoding(2, 112) with { FirstTokenTime = Ms(1_005) }, Decoding(3, 16)];
        EngineSnapshot now = Snapshots.Of(full, totalBlocks: 9);

        StepPlan plan = HybridTokenScheduler.Plan(now, Limits, Latency);
        Assert.That(plan.Preemptions.Select(id => id.Value), Does.Contain(3L));
        LatencyCoefficients rowsAreFree = LatencyCoefficients.Linear(10e-3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2e-5, 0.0);
        StepPlan free = HybridTokenScheduler.Plan(now, Limits, Latency with { Coefficients = rowsAreFree });
        Assert.That(free.Preemptions.Select(id => id.Value), Is.EqualTo(new long[] { 2 }));
    }

    [Test]
    public void Plan_UsedScratch_ChangesNothing()
    {
        var scratch = new PlannerScratch();
        EngineSnapshot large = LargeSnapshot();
        HybridTokenScheduler.Plan(large, Limits, Latency, scratch);
        EngineSnapshot small = Snapshots.Of([Decoding(1, 40), Prompt(2, 300)]);

        Assert.That(
            HybridTokenScheduler.Plan(small, Limits, Latency, scratch).ToString(),
            Is.EqualTo(HybridTokenScheduler.Plan(small, Limits, Latency).ToString()));
        Assert.That(
            HybridTokenScheduler.Plan(large, Limits, Latency, scratch).ToString(),
            Is.EqualTo(HybridTokenScheduler.Plan(large, Limits, Latency).ToString()));
    }

    [Test]
    public void Plan_256Running_AllocatesItsPlanAlone()
    {
        var scratch = new PlannerScratch();
        EngineSnapshot now = LargeSnapshot();
        StepPlan plan = HybridTokenScheduler.Plan(now, Limits, Latency, scratch);
        long before = GC.GetAllocatedBytesForCurrentThread();
        HybridTokenScheduler.Plan(now, Limits, Latency, scratch);
        long bytes = GC.GetAllocatedBytesForCurrentThread() - before;

        // Five arrays with a header of 24 bytes, ids and works of 8 and 16, windows of 16 and 24; the plan itself below 512.
        int arrays = (5 * 24) + (8 * (plan.Preemptions.Length + plan.Admissions.Length)) +
            (16 * (plan.Inference.Length + plan.Forward.Length)) + (24 * plan.Backward.Length);
        Assert.That(plan.Inference.Length, Is.GreaterThanOrEqualTo(256));
        Assert.That(bytes, Is.LessThanOrEqualTo(arrays + 512));
    }

    [Test]
    public void Tenants_FloodBesideOthers_StayWithinTheBound([Range(1, 8)] int seed)
    {
        Assert.That(FairnessRun.GapMax(seed, isFair: true), Is.LessThanOrEqualTo(FairnessRun.Bound));
    }

    [Test]
    public void Tenants_FirstComeFirstServed_BreaksTheBound() =>
        Assert.That(FairnessRun.GapMax(seed: 1, isFair: false), Is.GreaterThan(FairnessRun.Bound));

    [Test]
    public void TenantTable_ReturningTenant_IsLiftedToTheLeastWaiting()
    {
        var table = new TenantTable(new Dictionary<string, double> { ["b"] = 2.0 }, idleMax: 2);
        Tenant a = table.Enter("a");
        table.Admit(a, 100, Ms(1));
        table.Wait(a);
        Assert.That(table.Enter("b").Served, Is.EqualTo(100.0));
        Tenant anonymous = table.Enter(null);
        Assert.That(anonymous.Served, Is.EqualTo(100.0));
        Assert.That(table.Snapshot(), Has.Length.EqualTo(3));
        table.Leave(a, waiting: true);
        Assert.That(anonymous.Slot, Is.LessThan(2));
    }

    [Test]
    public void TenantTable_ManyNames_AreForgotten()
    {
        var table = new TenantTable(new Dictionary<string, double>(), idleMax: 10);
        for (int i = 0; i < 1_000; i++)
        {
            table.Leave(table.Enter($"t{i}"), waiting: true);
        }

        Assert.That(table.Count, Is.EqualTo(10));
    }

    /// <summary>256 decode, 64 wait, 4 jobs.</summary>
    internal static EngineSnapshot LargeSnapshot()
    {
        JobSnapshot forward = new() { Id = new(1), Weight = 1.0, Phase = JobPhase.Forward, SampleTokens = 900, LowestLayer = 0 };
        JobSnapshot backward = forward with { Phase = JobPhase.Backward, Layer = 3, RowsLeft = 900 };
        return Snapshots.Of(
            [.. Enumerable.Range(1, 256).Select(i => Decoding(i, 100 + i) with { TpotTarget = Ms(80), Tenant = i % 8 }),
             .. Enumerable.Range(257, 64).Select(i => Prompt(i, 200) with { TtftTarget = Ms(60_000), Tenant = i % 8 })],
            totalBlocks: 8_000) with
        {
            Jobs = [forward, backward with { Id = new(2) }, forward with { Id = new(3) }, backward with { Id = new(4) }],
            Tenants = [.. Enumerable.Range(0, 8).Select(i => new TenantSnapshot { Served = i, Weight = 1.0 })],
        };
    }

    private static StepPlan Plan(SequenceSnapshot[] sequences, params JobSnapshot[] jobs) =>
        HybridTokenScheduler.Plan(Snapshots.Of(sequences) with { Jobs = [.. jobs] }, Limits, Latency);
}
