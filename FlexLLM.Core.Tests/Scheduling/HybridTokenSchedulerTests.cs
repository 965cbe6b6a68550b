using System.Diagnostics;
using FlexLLM.Scheduling;
using NUnit.Framework;
using static FlexLLM.Tests.Scheduling.Snapshots;

namespace FlexLLM.Tests.Scheduling;

[TestFixture]
[Parallelizable]
internal sealed class HybridTokenSchedulerTests
{
    private static readonly StepLimits Limits = new()
    {
        TokensPerStepMax = 256,
        SequencesMax = 16,
        PromptHeldBack = 0.0,
        TpotPlanned = 1.0,
        ChunksAhead = 0,
    };

    [Test]
    public void Plan_MixedLoad_ReadsAsExpected()
    {
        StepPlan plan = Plan(
            [Decoding(1, 40), Decoding(2, 20), Prompt(3, 100) with { Phase = SequencePhase.Running }, Prompt(4, 50)],
            [Training(7, PositionsDone(30, of: 90)), TrainingBackward(8, layer: 2, rowsLeft: 25, of: 40)]);

        Assert.That(plan.ToString(), Is.EqualTo(
            "preempt [] admit [4] infer [1:40+1 2:20+1 3:0+100 4:0+50] forward [7:+60] " +
            "backward [8:layer 2[0..25) 8:layer 1[0..40) 8:layer 0[0..40)] 33.30 of 50.00 ms"));
    }

    [Test]
    public void Plan_Nothing_IsEmpty() => Assert.That(Plan([], []).IsEmpty, Is.True);

    [Test]
    public void Plan_Decoders_BoundFinetuningByTheTightest()
    {
        SequenceSnapshot tight = Decoding(2, 20) with { TpotTarget = Ms(20) };
        StepPlan plan = Plan([Decoding(1, 20), tight], [Training(7, PositionsDone(0, of: 1_000))]);

        Assert.That(plan.Budget, Is.EqualTo(Ms(20)));
        Assert.That(plan.Forward.Single().Tokens, Is.EqualTo(98), "10 + 100 rows of 0.1 ms are 20 ms");
    }

    [Test]
    public void Plan_SlackEarnedEarlier_MayBeSpentUpToItsBound([Values(1, 2, 3, 9)] int targetsAhead)
    {
        SequenceSnapshot ahead = Decoding(1, 50) with { TokensGenerated = targetsAhead, TpotTarget = Ms(12) };

        Assert.That(Plan([ahead], []).Budget, Is.EqualTo(Ms(12) * Math.Min(targetsAhead, 2)));
    }

    [Test]
    public void Plan_ChunkOfAPromptBreaksTheTarget_LeavesTimeForIt()
    {
        SequenceSnapshot ahead = Decoding(1, 50) with { TokensGenerated = 2, TpotTarget = Ms(11) };
        TimeSpan budget = Plan([ahead], [], Limits with { ChunksAhead = 8 }).Budget;
        Assert.That(budget.TotalMilliseconds, Is.EqualTo(22 - (8 * 0.7)).Within(1e-2), "a row and 16 of a prompt take 11.7 ms");
    }

    [Test]
    public void Plan_LateDecoder_TakesFinetuningToZero()
    {
        SequenceSnapshot late = Decoding(1, 50) with { FirstTokenTime = Ms(800) };

        Assert.That(Plan([late], [Training(7, PositionsDone(0, of: 100))]).HasFinetuning, Is.False);
    }

    [Test]
    public void Plan_Burst_TakesFinetuningToZeroInThatStep()
    {
        JobSnapshot[] jobs = [Training(7, PositionsDone(0, of: 500)), TrainingBackward(8, 3, 100, 100)];
        SequenceSnapshot[] burst = [.. Enumerable.Range(2, 12).Select(i => Prompt(i, 400) with { TtftTarget = Ms(650) })];

        Assert.That(Plan([Decoding(1, 50)], jobs).HasFinetuning, Is.True);
        Assert.That(Plan([Decoding(1, 50), .. burst], jobs).HasFinetuning, Is.False);
    }

    [Test]
    public void Plan_PromptWithTimeToSpare_LeavesRoomForFinetuning()
    {
        StepPlan plan = Plan([Prompt(1, 50) with { TtftTarget = Ms(60) }], [Training(7, PositionsDone(0, of: 1_000))]);

        Assert.That(plan.Inference.Single().Tokens, Is.EqualTo(50));
        Assert.That(plan.Budget, Is.EqualTo(Ms(60)));
        Assert.That(plan.Forward.Single().Tokens, Is.EqualTo(206), "the rows that the batch has left");
    }

    [Test]
    public void Plan_Idle_StaysWithinTheIdleStep()
    {
        StepPlan plan = Plan([], [TrainingBackward(7, 20, 5_000, 5_000)]);

        Assert.That(plan.LatencyPredicted, Is.EqualTo(Limits.IdleStepMax));
        Assert.That(plan.Backward.Sum(w => w.RowCount), Is.EqualTo(4_500));
        Assert.That(plan.Backward.Max(w => w.RowCount), Is.EqualTo(512), "BackwardRowsMax");
    }

    [Test]
    public void Plan_IdleAndModelTooCareful_DoesTheLeastWork()
    {
        LatencyModel slow = Latency with { Correction = 1_000.0 };

        ForwardWindow forward = Plan([], [Training(7, PositionsDone(5, of: 9))], latency: slow).Forward.Single();
        BackwardWindow backward = Plan([], [TrainingBackward(7, 3, 8, 9)], latency: slow).Backward.Single();
        Assert.That(forward, Is.EqualTo(new ForwardWindow(new(7), 2)), "the first row costs like any other");
        Assert.That(backward, Is.EqualTo(new BackwardWindow(new(7), 3, 7, 1)));
        Assert.That(Plan([Decoding(1, 20)], [Training(7, PositionsDone(5, of: 9))], latency: slow).HasFinetuning, Is.False);
    }

    [Test]
    public void Plan_BackwardItem_TakesNoLongerThanItsBound()
    {
        StepPlan plan = Plan([], [TrainingBackward(7, 3, 400, 400)], Limits with { BackwardItemTimeMax = Ms(2) });

        Assert.That(plan.Backward.Take(5).Select(w => w.RowCount), Is.EqualTo(new[] { 100, 100, 100, 100, 100 }));
        Assert.That(plan.Backward[4], Is.EqualTo(new BackwardWindow(new(7), 2, 300, 100)));
    }

    [Test]
    public void Plan_TwoJobs_TheLeastServedPerWeightGoesFirst()
    {
        JobSnapshot a = Training(1, PositionsDone(0, of: 900)) with { ServedTokens = 100, Weight = 1.0 };
        JobSnapshot b = Training(2, PositionsDone(0, of: 900)) with { ServedTokens = 150, Weight = 2.0 };

        Assert.That(Plan([Decoding(1, 20)], [a, b]).Forward.Single().Id, Is.EqualTo(b.Id));
        Assert.That(Plan([Decoding(1, 20)], [a, b with { Phase = JobPhase.Blocked }]).Forward.Single().Id, Is.EqualTo(a.Id));
    }

    [Test]
    public void Plan_PrefillBesideDecoders_StaysWithinTheirTarget()
    {
        StepPlan plan = Plan([Decoding(1, 20) with { TpotTarget = Ms(20) }, Prompt(2, 200)], []);

        Assert.That(plan.Inference[1].Tokens, Is.EqualTo(99));
        Assert.That(Plan([Prompt(2, 200)], []).Inference[0].Tokens, Is.EqualTo(200), "nobody decodes");
    }

    [Test]
    public void Plan_DecodersTakeAllTheTime_PromptsStillProgress()
    {
        StepPlan plan = Plan([Decoding(1, 20) with { TpotTarget = Ms(5) }, Prompt(2, 200), Prompt(3, 200)], []);

        Assert.That(plan.Inference.Select(w => w.Tokens), Is.EqualTo(new[] { 1, Limits.PrefillChunkMin }));
    }

    [Test]
    public void Plan_NotEnoughBlocks_PreemptsTheLowestPriorityThenTheMostSlack()
    {
        SequenceSnapshot[] full = [Decoding(1, 16), Decoding(2, 16), Decoding(3, 16), Decoding(4, 16)];
        SequenceSnapshot[] slack = [full[0], full[1] with { TokensGenerated = 2 }, full[2], full[3]];
        SequenceSnapshot[] priority = [full[0], slack[1], full[2] with { Priority = -1, ArrivalTime = Ms(0) }, full[3]];

        Assert.That(Preempted(full), Is.EqualTo(new long[] { 3, 4 }), "the last in order");
        Assert.That(Preempted(slack), Is.EqualTo(new long[] { 2, 4 }));
        Assert.That(Preempted(priority), Is.EqualTo(new long[] { 2, 3 }));

        // 4 blocks are held, none is free: two victims make room for the two others.
        static IEnumerable<long> Preempted(SequenceSnapshot[] sequences)
        {
            StepPlan plan = Plan(sequences, [], totalBlocks: 4);
            Assert.That(plan.Inference, Has.Length.EqualTo(2));
            return plan.Preemptions.Select(id => id.Value).Order();
        }
    }

    [Test]
    public void Plan_NotEnoughBlocks_NeverPreemptsTheFirst()
    {
        SequenceSnapshot first = Decoding(1, 16) with { TokensGenerated = 9, ArrivalTime = Ms(0) };

        Assert.That(Plan([first, Decoding(2, 16)], [], totalBlocks: 2).Preemptions, Is.EqualTo(new[] { new SequenceId(2) }));
    }

    [Test]
    public void Plan_Admission_LeavesRoomForGrowth()
    {
        SequenceSnapshot[] sequences = [Decoding(1, 20) with { TokensMax = 200 }, Prompt(2, 30)];

        // 1 may come to 21 + 64 tokens (6 blocks), 2 to 30 + 64 (6 blocks): 12.
        Assert.That(Plan(sequences, [], totalBlocks: 13).Admissions, Has.Length.EqualTo(1));
        Assert.That(Plan(sequences, [], Limits with { GrowthHorizon = 76 }, totalBlocks: 13).Admissions, Is.Empty);
        StepPlan alone = Plan([sequences[1]], [], Limits with { GrowthHorizon = 999 }, totalBlocks: 13);
        Assert.That(alone.Admissions, Has.Length.EqualTo(1));
    }

    [Test]
    public void Plan_HeadThatDoesNotFit_IsPassedForAWhile()
    {
        SequenceSnapshot head = Prompt(2, 150) with { ArrivalTime = Ms(500), TokensMax = 150 };
        SequenceSnapshot small = Prompt(3, 10) with { ArrivalTime = Ms(600), TokensMax = 16 };
        SequenceSnapshot[] sequences = [Decoding(1, 20) with { ArrivalTime = Ms(0) }, head, small];

        Assert.That(Plan(sequences, [], totalBlocks: 11).Admissions, Is.EqualTo(new[] { small.Id }));
        Assert.That(Plan(sequences, [], Limits with { SkipAheadMax = 0 }, totalBlocks: 11).Admissions, Is.Empty);
        Assert.That(Plan(sequences, [], Limits with { SkipAheadWaitMax = Ms(400) }, totalBlocks: 11).Admissions, Is.Empty);
    }

    [Test]
    public void Plan_HigherPriority_GoesFirstUntilOthersAged()
    {
        SequenceSnapshot old = Prompt(1, 200) with { ArrivalTime = Ms(0) };
        SequenceSnapshot urgent = Prompt(2, 200) with { ArrivalTime = Ms(900), Priority = 1 };

        Assert.That(Plan([old, urgent], []).Inference[0].Id, Is.EqualTo(urgent.Id));
        Assert.That(Plan([old, urgent], [], Limits with { AgeingPerPriority = Ms(800) }).Inference[0].Id, Is.EqualTo(old.Id));
    }

    [Test]
    public void Plan_SequenceThatCanNeverFit_BreaksInvariant() =>
        Assert.That(
            () => Plan([Prompt(1, 50) with { TokensMax = 161 }], [], totalBlocks: 10), Throws.TypeOf<UnreachableException>());

    private static StepPlan Plan(
        SequenceSnapshot[] sequences,
        JobSnapshot[] jobs,
        StepLimits? limits = null,
        int totalBlocks = 500,
        LatencyModel? latency = null)
    {
        EngineSnapshot now = Snapshots.Of(sequences, totalBlocks) with { Jobs = [.. jobs] };
        return HybridTokenScheduler.Plan(now, limits ?? Limits, latency ?? Latency);
    }

    private static JobSnapshot Training(long id, JobSnapshot progress) =>
        progress with { Id = new JobId(id), Phase = JobPhase.Forward };

    private static JobSnapshot PositionsDone(int done, int of) =>
        new() { Id = default, Weight = 1.0, Phase = JobPhase.Blocked, PositionsDone = done, SampleTokens = of };

    private static JobSnapshot TrainingBackward(long id, int layer, int rowsLeft, int of) => new()
    {
        Id = new JobId(id),
        Weight = 1.0,
        Phase = JobPhase.Backward,
        SampleTokens = of,
        Layer = layer,
        RowsLeft = rowsLeft,
    };
}
