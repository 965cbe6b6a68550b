using System.Diagnostics;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;
using NUnit.Framework;
using static FlexLLM.Tests.Scheduling.Snapshots;

namespace FlexLLM.Tests.Scheduling;

[TestFixture]
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

        Assert.That(Plan([ahead], []).Budget, Is.EqualTo(Ms(12) * Math.Min(targetsAhead, 4)));
    }

    [Test]
    public void Plan_ChunkOfAPromptBreaksTheTarget_LeavesTimeForIt()
    {
        SequenceSnapshot ahead = Decoding(1, 50) with { TokensGenerated = 3, TpotTarget = Ms(11) };
        TimeSpan budget = Plan([ahead], [], Limits with { ChunksAhead = 8 }).Budget;
        Assert.That(budget.TotalMilliseconds, Is.EqualTo(33 - (8 * 0.7)).Within(1e-2), "a row and 16 of a prompt take 11.7 ms");
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

    [Test]
    public void Plan_RandomSnapshots_KeepEveryProperty([Range(1, 20)] int seed)
    {
        var random = new SeededRandom((ulong)seed);
        for (int i = 0; i < 40; i++)
        {
            (EngineSnapshot now, StepLimits limits, LatencyModel latency) = RandomCase(ref random);
            StepPlan plan = HybridTokenScheduler.Plan(now, limits, latency);
            string text = plan.ToString();

            StepPlan alone = HybridTokenScheduler.Plan(now with { Jobs = [] }, limits, latency);
            Assert.That(alone.Inference, Is.EqualTo(plan.Inference).AsCollection, "jobs change no inference");
            Assert.That(alone.Preemptions, Is.EqualTo(plan.Preemptions).AsCollection);
            Assert.That(alone.Admissions, Is.EqualTo(plan.Admissions).AsCollection);

            SequenceSnapshot[] sequences = [.. now.Sequences];
            JobSnapshot[] jobs = [.. now.Jobs];
            random.Shuffle(sequences.AsSpan());
            random.Shuffle(jobs.AsSpan());
            EngineSnapshot other = now with { Sequences = [.. sequences], Jobs = [.. jobs] };
            StepPlan shuffled = HybridTokenScheduler.Plan(other, limits, latency);
            Assert.That(shuffled.ToString(), Is.EqualTo(text), "the order of the snapshot means nothing");

            Assert.That(FaultOf(plan, now, limits, latency), Is.Null, text);
        }
    }

    [Test]
    public void FaultOf_PlanWithOneTokenLessOrMore_IsDetected()
    {
        var random = new SeededRandom(1);
        int tried = 0;
        for (int i = 0; i < 500; i++)
        {
            (EngineSnapshot now, StepLimits limits, LatencyModel latency) = RandomCase(ref random);
            StepPlan plan = HybridTokenScheduler.Plan(now, limits, latency);
            if (plan.Forward.IsEmpty || now.Sequences.IsEmpty || plan.Forward[0].Tokens == 1)
            {
                continue;
            }

            foreach (int change in new[] { -1, 1 })
            {
                ForwardWindow first = plan.Forward[0] with { Tokens = plan.Forward[0].Tokens + change };
                StepPlan changed = plan with { Forward = [first, .. plan.Forward.Skip(1)] };
                StepFeatures features = default;
                features = plan.Inference.Aggregate(features, (f, w) => f.WithInference(w.ContextLength, w.Tokens));
                features = features with { SampledRows = plan.Features.SampledRows };
                features = changed.Forward.Aggregate(
                    features, (f, w) => f.WithForward(now.Jobs.Single(j => j.Id == w.Id).ForwardStart, w.Tokens));
                features = plan.Backward.Aggregate(features, (f, w) => f.WithBackward(w.RowStart, w.RowCount));
                changed = changed with { Features = features, LatencyPredicted = latency.Predict(features) };
                Assert.That(FaultOf(changed, now, limits, latency), Is.Not.Null);
                tried++;
            }
        }

        Assert.That(tried, Is.GreaterThan(20));
    }

    /// <summary>What is wrong with the finetuning part of a plan; null where it is feasible and maximal.</summary>
    private static string? FaultOf(StepPlan plan, EngineSnapshot now, StepLimits limits, LatencyModel latency)
    {
        bool late = now.Sequences.Any(s => s.TpotSlack(now.Now) < TimeSpan.Zero);
        StepFeatures done = plan.Features;
        bool least = now.Sequences.IsEmpty && done.ForwardWindows + done.BackwardItems == 1 &&
            (done.ForwardRows + done.BackwardRows == 1 ||
                plan.LatencyPredicted - latency.Predict(default) <= LongestPiece(limits, latency, done));
        if (plan.HasFinetuning && !least && (late || plan.LatencyPredicted > plan.Budget))
        {
            return "finetuning without slack";
        }

        int rows = plan.Features.InferenceRows + plan.Features.ForwardRows;
        if (rows > limits.TokensPerStepMax)
        {
            return "too many rows";
        }

        foreach (JobSnapshot job in now.Jobs.Where(j => j.Phase != JobPhase.Blocked))
        {
            // The sample at work, or the one ahead of it.
            int tokens = plan.Forward.Where(w => w.Id == job.Id).Sum(w => w.Tokens);
            if (tokens > job.ForwardTokensLeft || plan.Forward.Count(w => w.Id == job.Id) > 1)
            {
                return "more tokens than the sample has, or not in one window";
            }

            StepFeatures more = plan.Features with
            {
                ForwardWindows = plan.Features.ForwardWindows + (tokens == 0 ? 1 : 0),
                ForwardRows = plan.Features.ForwardRows + 1,
                ForwardContext = plan.Features.ForwardContext + job.ForwardStart + tokens + 1,
            };
            int open = Math.Min(job.ForwardTokensLeft, limits.TokensPerStepMax - rows);
            bool isDear = tokens == 0 && IsDear(
                plan, limits, latency, open, n => plan.Features.WithForward(job.ForwardStart, n));
            if (tokens < job.ForwardTokensLeft && open > 0 && latency.Predict(more) <= plan.Budget && !isDear)
            {
                return $"job {job.Id.Value} could do more";
            }

            if (job.Phase == JobPhase.Backward)
            {
                BackwardWindow[] windows = [.. plan.Backward.Where(w => w.Id == job.Id)];
                (int layer, int left) = (job.Layer, job.RowsLeft);
                foreach (BackwardWindow window in windows)
                {
                    (layer, left) = left == 0 ? (layer - 1, job.SampleTokens) : (layer, left);
                    bool onCursor = window.Layer == layer && window.RowStart + window.RowCount == left && window.RowStart >= 0;
                    StepFeatures item = default(StepFeatures).WithBackward(window.RowStart, window.RowCount);
                    TimeSpan time = latency.Predict(item) - latency.Predict(default) - TimeSpan.FromTicks(2);
                    bool tooLong = window.RowCount > 1 && time > LongestPiece(limits, latency, item);
                    if (!onCursor || tooLong || window.RowCount > limits.BackwardRowsMax)
                    {
                        return "a window off the cursor or too large";
                    }

                    left = window.RowStart;
                }

                (layer, left) = left == 0 ? (layer - 1, job.SampleTokens) : (layer, left);
                if (layer < job.LowestLayer)
                {
                    continue;
                }

                isDear = windows.Length == 0 && IsDear(
                    plan, limits, latency, left, n => plan.Features.WithBackward(left - n, n));
                if (latency.Predict(plan.Features.WithBackward(left - 1, 1)) <= plan.Budget && !isDear)
                {
                    return $"job {job.Id.Value} could do more";
                }
            }
        }

        return null;
    }

    // What a window or an item may take in any case: twice what it costs before its first row; an item also its own bound.
    private static TimeSpan LongestPiece(StepLimits limits, LatencyModel latency, StepFeatures piece)
    {
        TimeSpan pays = (latency.PredictFixed(piece) * 2.0) + TimeSpan.FromTicks(2);
        TimeSpan bound = piece.BackwardItems > 0 ? limits.BackwardItemTimeMax : TimeSpan.Zero;
        return pays > bound ? pays : bound;
    }

    // Whether no more than a part of this work fits, most of which would be what it costs by itself.
    private static bool IsDear(StepPlan plan, StepLimits limits, LatencyModel latency, int max, Func<int, StepFeatures> with)
    {
        int rows = Bisection.Largest(max, n => latency.Predict(with(n)) <= plan.Budget);
        TimeSpan all = latency.Predict(with(rows)) - plan.LatencyPredicted;
        TimeSpan itself = latency.PredictFixed(with(rows)) - latency.PredictFixed(plan.Features);
        return rows < max && itself > all * limits.FixedShareMax;
    }

    private static (EngineSnapshot Now, StepLimits Limits, LatencyModel Latency) RandomCase(ref SeededRandom random)
    {
        const int Total = 300;
        int free = Total;
        TimeSpan now = TimeSpan.FromSeconds(10);
        var sequences = new List<SequenceSnapshot>();
        for (int i = random.Next(4) == 0 ? 0 : random.Next(20); i > 0; i--)
        {
            int prompt = random.Next(1, 300);
            int generated = random.Next(50);
            int total = prompt + generated;
            int computed = random.Next(3) == 0 ? random.Next(total) : total - 1;
            int blocks = ((computed + 15) / 16) + (random.Next(10) == 0 ? 1 : 0);
            bool runs = random.Next(3) > 0 && blocks <= free;
            free -= runs ? blocks : 0;
            sequences.Add(new SequenceSnapshot
            {
                Id = new SequenceId(i),
                Phase = runs ? SequencePhase.Running : SequencePhase.Waiting,
                TokensTotal = total,
                TokensComputed = runs ? computed : 0,
                TokensMax = total + random.Next(200),
                BlocksHeld = runs ? blocks : 0,
                Priority = random.Next(3),
                ArrivalTime = now - TimeSpan.FromSeconds(3.0 * random.NextDouble()),
                FirstTokenTime = generated == 0 ? null : now - (Ms(30) * generated) + Ms(random.Next(-5, 300)),
                TokensGenerated = generated,
                TpotTarget = Ms(random.Next(28, 90)),
                TtftTarget = Ms(random.Next(1_000, 20_000)),
            });
        }

        free += ShareBeginning(sequences, random.Next(5));
        var jobs = new List<JobSnapshot>();
        for (int i = random.Next(4); i > 0; i--)
        {
            int sample = random.Next(1, 900);
            int ahead = random.Next(2) * random.Next(1, 900);
            jobs.Add(new JobSnapshot
            {
                Id = new JobId(i),
                Weight = 0.5 + random.NextDouble(),
                Phase = (JobPhase)random.Next(3),
                ServedTokens = random.Next(1_000),
                SampleTokens = sample,
                PositionsDone = random.Next(sample),
                AheadTokens = ahead,
                AheadDone = ahead == 0 ? 0 : random.Next(ahead + 1),
                Layer = random.Next(2, 6),
                LowestLayer = random.Next(3),
                RowsLeft = random.Next(1, sample + 1),
            });
        }

        var snapshot = new EngineSnapshot
        {
            Now = now,
            Sequences = [.. sequences],
            Jobs = [.. jobs],
            FreeBlocks = free,
            TotalBlocks = Total,
            TokensPerBlock = 16,
        };
        StepLimits limits = Limits with
        {
            TokensPerStepMax = random.Next(20, 600),
            BackwardRowsMax = random.Next(1, 400),
            BackwardItemTimeMax = Ms(random.Next(1, 20)),
        };
        LatencyModel latency = LatencyModel.Default with { Correction = 0.02 + (0.2 * random.NextDouble()) };
        latency = random.Next(2) == 0 ? latency : latency with { Coefficients = Bent(latency.Coefficients, ref random) };
        return (snapshot, limits, latency);
    }

    // All that are long enough begin alike: blocks that running sequences share, and that waiting ones find. Returns blocks saved.
    private static int ShareBeginning(List<SequenceSnapshot> sequences, int blocks)
    {
        int holders = sequences.Count(Holds);
        for (int i = 0; i < sequences.Count; i++)
        {
            SequenceSnapshot s = sequences[i];
            if (Holds(s))
            {
                sequences[i] = s with { BlocksShared = holders > 1 ? blocks : 0 };
            }
            else if (s.Phase == SequencePhase.Waiting && s.TokensTotal > blocks * 16)
            {
                sequences[i] = s with { TokensComputed = blocks * 16, BlocksHeld = blocks, BlocksShared = holders > 0 ? blocks : 0 };
            }
        }

        return Math.Max(0, holders - 1) * blocks;

        bool Holds(SequenceSnapshot s) => s.Phase == SequencePhase.Running && s.TokensComputed >= blocks * 16;
    }

    /// <summary>Every term up to four times as dear or as cheap, some free: curves that bend either way.</summary>
    private static LatencyCoefficients Bent(LatencyCoefficients line, ref SeededRandom random)
    {
        double[] values = new double[LatencyCoefficients.Count];
        line.CopyTo(values);
        foreach (ref double value in values.AsSpan())
        {
            value *= random.Next(6) == 0 ? 0.0 : Math.Pow(4.0, (2.0 * random.NextDouble()) - 1.0);
        }

        return LatencyCoefficients.From(values);
    }

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
