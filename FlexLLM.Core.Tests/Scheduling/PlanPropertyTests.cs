using FlexLLM.Primitives;
using FlexLLM.Scheduling;
using NUnit.Framework;
using static FlexLLM.Tests.Scheduling.Snapshots;

namespace FlexLLM.Tests.Scheduling;

/// <summary>
/// What plans of random requests and jobs keep to: the same input gives the same plan, jobs change no inference, and the finetuning part is
/// feasible and maximal under the model.
/// </summary>
[TestFixture]
[Parallelizable]
internal sealed class PlanPropertyTests
{
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
        var limits = new StepLimits
        {
            SequencesMax = 16,
            PromptHeldBack = 0.0,
            TpotPlanned = 1.0,
            ChunksAhead = 0,
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
}
