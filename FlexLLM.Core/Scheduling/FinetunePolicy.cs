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
    public static TimeSpan BudgetOf(EngineSnapshot now, in InferencePlan inference, StepLimits limits, in LatencyModel latency)
    {
        TimeSpan own = now.Sequences.IsEmpty ? TimeSpan.Zero : latency.Predict(inference.Features);
        TimeSpan budget = own + limits.IdleStepMax;
        foreach (ref readonly SequenceSnapshot s in now.Sequences.AsSpan())
        {
            if (s.IsDecoding && s.FirstTokenTime is not null && s.InterTokenTarget is TimeSpan interToken)
            {
                budget = Min(budget, interToken);
            }

            if (s.TpotSlack(now.Now) is TimeSpan slack)
            {
                TimeSpan spendable = slack * (1.0 - limits.SlackHeldBack);
                budget = Min(budget, Min(spendable, s.TpotTarget * limits.SlackTargetsMax));
            }
        }

        long tokensAhead = 0;
        foreach ((int index, int tokensLeft) in inference.Prompts)
        {
            ref readonly SequenceSnapshot s = ref now.Sequences.ItemRef(index);
            tokensAhead += tokensLeft;
            if (s.FirstTokenTime is null)
            {
                TimeSpan untilDeadline = s.ArrivalTime + s.TtftTarget - now.Now;
                TimeSpan spare = PromptSpares(untilDeadline, tokensAhead, inference.PromptTokens, own, limits);
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
        EngineSnapshot now, StepFeatures inference, TimeSpan budget, StepLimits limits, in LatencyModel latency,
        PlannerScratch scratch)
    {
        ImmutableArray<ForwardWindow>.Builder forward = scratch.Forward;
        ImmutableArray<BackwardWindow>.Builder backward = scratch.Backward;
        StepFeatures features = inference;
        List<int> order = scratch.Jobs;
        OrderJobs(now, order);
        foreach (int index in order)
        {
            JobSnapshot job = now.Jobs[index];
            int place = forward.Count;
            if (job.Phase == JobPhase.Forward)
            {
                features = AddForward(job, features, place, budget, limits, latency, forward);
                continue;
            }

            // Half of the time each, so that the sample ahead is done when the one before it is; what one leaves is the other's.
            if (job.ForwardTokensLeft > 0)
            {
                TimeSpan spent = latency.Predict(features);
                features = AddForward(job, features, place, spent + ((budget - spent) / 2), limits, latency, forward);
            }

            features = AddBackward(job, features, budget, limits, latency, backward);
            if (job.ForwardTokensLeft > 0)
            {
                features = AddForward(job, features, place, budget, limits, latency, forward);
            }
        }

        bool idle = now.Sequences.IsEmpty && order.Count > 0 && forward.Count + backward.Count == 0;
        if (idle)
        {
            AddLeast(now.Jobs[order[0]], forward, backward, ref features);
        }

        return new FinetunePlan(forward.ToImmutable(), backward.ToImmutable(), features);
    }

    /// <summary>
    /// What the step may take beyond inference for this prompt to meet its deadline, if every later step does the same.
    /// </summary>
    private static TimeSpan PromptSpares(
        TimeSpan untilDeadline, long tokensAhead, int promptTokens, TimeSpan own, StepLimits limits)
    {
        if (promptTokens == 0 && tokensAhead > 0) // Blocked by KV blocks or places: nobody knows for how long.
        {
            return TimeSpan.Zero;
        }

        double steps = 1.0 + (tokensAhead == 0 ? 0.0 : Math.Ceiling((double)tokensAhead / promptTokens));
        TimeSpan spare = (untilDeadline - (own * steps)) / steps * (1.0 - limits.SlackHeldBack);
        return spare > TimeSpan.Zero ? spare : TimeSpan.Zero;
    }

    // Jobs are few: each is put in front of those that had more.
    private static void OrderJobs(EngineSnapshot now, List<int> order)
    {
        for (int i = 0; i < now.Jobs.Length; i++)
        {
            if (now.Jobs[i].Phase == JobPhase.Blocked)
            {
                continue;
            }

            int place = order.Count;
            while (place > 0 && now.Jobs[i].GoesBefore(now.Jobs[order[place - 1]]))
            {
                place--;
            }

            order.Insert(place, i);
        }
    }

    /// <summary>
    /// As many tokens as fit: a new window behind the others, or more of the job's own at this place in the list.
    /// </summary>
    private static StepFeatures AddForward(
        JobSnapshot job, StepFeatures features, int place, TimeSpan budget, StepLimits limits, LatencyModel latency,
        ImmutableArray<ForwardWindow>.Builder forward)
    {
        Check.That(job.ForwardTokensLeft > 0);
        bool isNew = place == forward.Count;
        int had = isNew ? 0 : forward[place].Tokens;
        int start = job.ForwardStart + had;
        StepFeatures before = isNew ? features with { ForwardWindows = features.ForwardWindows + 1 } : features;
        int tokensMax = Math.Min(job.ForwardTokensLeft - had, limits.TokensPerStepMax - features.BatchRows);
        int tokens = Bisection.Largest(
            tokensMax, new Search(before, start, budget, latency),
            static (in Search s, int n) => s.Latency.Predict(s.Before.WithLongerForward(s.Position, n)) <= s.Most);
        if (tokens == 0)
        {
            return features;
        }

        var window = new ForwardWindow(job.Id, had + tokens);
        if (isNew)
        {
            forward.Add(window);
        }
        else
        {
            forward[place] = window;
        }

        return before.WithLongerForward(start, tokens);
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
                int rowsMax = Math.Max(1, BackwardRows(Math.Min(end, limits.BackwardRowsMax), new Search(before, end, itemEnd, latency)));
                int rows = BackwardRows(rowsMax, new Search(before, end, budget, latency));
                if (rows == 0)
                {
                    return features;
                }

                rowsLeft -= rows;
                backward.Add(new BackwardWindow(job.Id, layer, rowsLeft, rows));
                features = before.WithBackward(rowsLeft, rows);
            }
        }

        return features;
    }

    private static int BackwardRows(int max, in Search search) => Bisection.Largest(
        max, search, static (in Search s, int n) => s.Latency.Predict(s.Before.WithBackward(s.Position - n, n)) <= s.Most);

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

    // A search for the most rows at a position; backward, the position is their end.
    private readonly record struct Search(StepFeatures Before, int Position, TimeSpan Most, LatencyModel Latency);
}
