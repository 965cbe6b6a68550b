using System.Collections.Immutable;
using FlexLLM.Primitives;

namespace FlexLLM.Scheduling;

/// <summary>The finetuning part of a plan; Features include the inference part.</summary>
internal sealed record FinetunePlan(
    ImmutableArray<ForwardWindow> Forward, ImmutableArray<BackwardWindow> Backward, StepFeatures Features);

/// <summary>
/// Stage 2: the largest finetuning work that keeps the step's predicted time within a budget. Jobs in the order of what they
/// had so far per weight, each as much as fits.
/// </summary>
internal static class FinetunePolicy
{
    /// <summary>
    /// How long the step may take. The mean time per token of a request may not pass its target, so what it was ahead
    /// may be spent, a part per step; prompts come first, so finetuning gets only what they can surely spare.
    /// </summary>
    public static TimeSpan BudgetOf(EngineSnapshot now, InferencePlan inference, StepLimits limits, in LatencyModel latency)
    {
        TimeSpan own = now.Sequences.IsEmpty ? TimeSpan.Zero : latency.Predict(inference.Features);
        TimeSpan budget = own + limits.IdleStepMax;
        foreach (SequenceSnapshot s in now.Sequences)
        {
            if (s.TpotSlack(now.Now) is TimeSpan slack)
            {
                TimeSpan spendable = slack * (1.0 - limits.SlackHeldBack);
                budget = Min(budget, Min(spendable, s.TpotTarget * limits.SlackTargetsMax));
            }
        }

        long tokensAhead = 0;
        foreach ((SequenceSnapshot s, int tokensLeft) in inference.Prompts)
        {
            tokensAhead += tokensLeft;
            if (s.FirstTokenTime is null)
            {
                TimeSpan untilDeadline = s.ArrivalTime + s.TtftTarget - now.Now;
                TimeSpan spare = PromptSpares(untilDeadline, s.TtftTarget, tokensAhead, inference.PromptTokens, own, limits);
                budget = Min(budget, own + spare);
            }
        }

        return budget > own ? own + ((budget - own) * Headroom(now, limits)) : budget;
    }

    // How much of the slack may be spent for the cache's sake. Blocks are held for as long as an answer takes; what finetuning adds to that
    // comes back as a queue, which no later step could make good in time.
    private static double Headroom(EngineSnapshot now, StepLimits limits) =>
        now.Sequences.IsEmpty || limits.FreeBlocksShare == 0.0
            ? 1.0
            : Math.Min(1.0, (double)now.FreeBlocks / now.TotalBlocks / limits.FreeBlocksShare);

    public static FinetunePlan Fill(
        EngineSnapshot now, StepFeatures inference, TimeSpan budget, StepLimits limits, in LatencyModel latency)
    {
        var forward = ImmutableArray.CreateBuilder<ForwardWindow>();
        var backward = ImmutableArray.CreateBuilder<BackwardWindow>();
        StepFeatures features = inference;
        JobSnapshot[] jobs =
            [.. now.Jobs.Where(j => j.Phase != JobPhase.Blocked).OrderBy(ServedPerWeight).ThenBy(j => j.Id.Value)];
        foreach (JobSnapshot job in jobs)
        {
            if (job.Phase == JobPhase.Forward)
            {
                features = AddForward(job, features, budget, limits, latency, forward);
                continue;
            }

            // Half of the time each, so that the sample ahead is done when the one before it is; what one leaves is the other's.
            StepFeatures before = features;
            int ahead = forward.Count;
            if (job.ForwardTokensLeft > 0)
            {
                TimeSpan spent = latency.Predict(before);
                features = AddForward(job, before, spent + ((budget - spent) / 2), limits, latency, forward);
            }

            features = AddBackward(job, features, budget, limits, latency, backward);
            if (job.ForwardTokensLeft > 0)
            {
                features = Extend(job, features, ahead, budget, limits, latency, forward);
            }
        }

        bool idle = now.Sequences.IsEmpty && jobs.Length > 0 && forward.Count + backward.Count == 0;
        if (idle)
        {
            AddLeast(jobs[0], forward, backward, ref features);
        }

        return new FinetunePlan(forward.ToImmutable(), backward.ToImmutable(), features);
    }

    /// <summary>
    /// What the step may take beyond inference for this prompt to meet its deadline, if every later step does the same.
    /// </summary>
    private static TimeSpan PromptSpares(
        TimeSpan untilDeadline, TimeSpan target, long tokensAhead, int promptTokens, TimeSpan own, StepLimits limits)
    {
        if (promptTokens == 0 && tokensAhead > 0) // Blocked by KV blocks or places: nobody knows for how long.
        {
            return TimeSpan.Zero;
        }

        double steps = 1.0 + (tokensAhead == 0 ? 0.0 : Math.Ceiling((double)tokensAhead / promptTokens));
        TimeSpan spare = (untilDeadline - (own * steps)) / steps * (1.0 - limits.SlackHeldBack);
        return spare > TimeSpan.Zero ? spare : TimeSpan.Zero;
    }

    private static double ServedPerWeight(JobSnapshot job)
    {
        Check.That(job.Weight > 0.0);
        return job.ServedPerWeight;
    }

    private static StepFeatures AddForward(
        JobSnapshot job, StepFeatures features, TimeSpan budget, StepLimits limits, LatencyModel latency,
        ImmutableArray<ForwardWindow>.Builder forward)
    {
        Check.That(job.ForwardTokensLeft > 0);
        int tokensMax = Math.Min(job.ForwardTokensLeft, limits.TokensPerStepMax - features.InferenceRows - features.ForwardRows);
        int tokens = Bisection.Largest(tokensMax, n => latency.Predict(features.WithForward(job.ForwardStart, n)) <= budget);
        if (tokens == 0)
        {
            return features;
        }

        forward.Add(new ForwardWindow(job.Id, tokens));
        return features.WithForward(job.ForwardStart, tokens);
    }

    /// <summary>Makes the job's window, at this place in the list where it has one, as large as fits now.</summary>
    private static StepFeatures Extend(
        JobSnapshot job, StepFeatures features, int place, TimeSpan budget, StepLimits limits, LatencyModel latency,
        ImmutableArray<ForwardWindow>.Builder forward)
    {
        if (place == forward.Count)
        {
            return AddForward(job, features, budget, limits, latency, forward);
        }

        int had = forward[place].Tokens;
        int start = job.ForwardStart + had;
        int tokensMax = Math.Min(job.ForwardTokensLeft - had, limits.TokensPerStepMax - features.InferenceRows - features.ForwardRows);
        int more = Bisection.Largest(tokensMax, n => latency.Predict(features.WithLongerForward(start, n)) <= budget);
        forward[place] = new ForwardWindow(job.Id, had + more);
        return more == 0 ? features : features.WithLongerForward(start, more);
    }

    private static StepFeatures AddBackward(
        JobSnapshot job, StepFeatures features, TimeSpan budget, StepLimits limits, LatencyModel latency,
        ImmutableArray<BackwardWindow>.Builder backward)
    {
        Check.That(job.RowsLeft > 0 && job.RowsLeft <= job.SampleTokens && job.Layer >= job.LowestLayer);
        int rowsLeft = job.RowsLeft;
        for (int layer = job.Layer; layer >= job.LowestLayer; layer--, rowsLeft = job.SampleTokens)
        {
            while (rowsLeft > 0)
            {
                StepFeatures before = features;
                int end = rowsLeft;
                TimeSpan itemEnd = latency.Predict(before) + limits.BackwardItemTimeMax;
                int rowsMax = Math.Max(1, Largest(Math.Min(end, limits.BackwardRowsMax), itemEnd));
                int rows = Largest(rowsMax, budget);
                if (rows == 0)
                {
                    return features;
                }

                rowsLeft -= rows;
                backward.Add(new BackwardWindow(job.Id, layer, rowsLeft, rows));
                features = before.WithBackward(rowsLeft, rows);

                int Largest(int max, TimeSpan most) =>
                    Bisection.Largest(max, n => latency.Predict(before.WithBackward(end - n, n)) <= most);
            }
        }

        return features;
    }

    /// <summary>
    /// The least work there is. An idle machine always does it: a model that expects too much would never learn better.
    /// </summary>
    private static void AddLeast(
        JobSnapshot job, ImmutableArray<ForwardWindow>.Builder forward, ImmutableArray<BackwardWindow>.Builder backward,
        ref StepFeatures features)
    {
        if (job.Phase == JobPhase.Forward)
        {
            forward.Add(new ForwardWindow(job.Id, 1));
            features = features.WithForward(job.PositionsDone, 1);
        }
        else
        {
            backward.Add(new BackwardWindow(job.Id, job.Layer, job.RowsLeft - 1, 1));
            features = features.WithBackward(job.RowsLeft - 1, 1);
        }
    }

    private static TimeSpan Min(TimeSpan a, TimeSpan b) => a < b ? a : b;
}
