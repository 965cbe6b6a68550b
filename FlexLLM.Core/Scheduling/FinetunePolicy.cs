using System.Collections.Immutable;
using FlexLLM.Primitives;

namespace FlexLLM.Scheduling;

/// <summary>The finetuning part of a plan; Features include the inference part.</summary>
internal sealed record FinetunePlan(
    ImmutableArray<ForwardWindow> Forward, ImmutableArray<BackwardWindow> Backward, StepFeatures Features);

/// <summary>How long a step may take for finetuning to have a part in it.</summary>
/// <param name="Most">Its end; before the end of the inference part where there is no time.</param>
/// <param name="Grows">Whether a step without finetuning would leave more to the next one.</param>
internal readonly record struct FinetuneBudget(TimeSpan Most, bool Grows)
{
    /// <summary>The lesser of this and another bound.</summary>
    public FinetuneBudget Within(TimeSpan most, bool grows) => most < Most ? new FinetuneBudget(most, grows) : this;
}

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
    public static FinetuneBudget BudgetOf(EngineSnapshot now, in InferencePlan inference, StepLimits limits, in LatencyModel latency)
    {
        TimeSpan own = now.Sequences.IsEmpty ? TimeSpan.Zero : latency.Predict(inference.Features);
        var budget = new FinetuneBudget(own + limits.IdleStepMax, Grows: false);
        TimeSpan chunk = latency.Predict(inference.Features.WithInference(0, limits.PrefillChunkMin, sampled: 0));
        foreach (ref readonly SequenceSnapshot s in now.Sequences.AsSpan())
        {
            if (s.IsDecoding && s.FirstTokenTime is not null && s.InterTokenTarget is TimeSpan interToken)
            {
                budget = budget.Within(interToken, grows: false);
            }

            if (s.TpotSlack(now.Now, limits.TpotPlanned) is TimeSpan slack)
            {
                TimeSpan kept = limits.KeepsReserve ? now.Reserve.For(s.TokensMax - s.TokensTotal, s.TpotTarget) : TimeSpan.Zero;
                TimeSpan ahead = chunk > s.TpotTarget ? (chunk - s.TpotTarget) * limits.ChunksAhead : TimeSpan.Zero;
                kept = ahead > kept ? ahead : kept;
                budget = budget.Within(slack - kept, grows: s.IsDecoding && s.TpotTarget > own);
                budget = budget.Within(s.TpotTarget * limits.SlackTargetsMax, grows: false);
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
                budget = budget.Within(own + spare, grows: false);
            }
        }

        return budget.Most > own ? budget with { Most = own + ((budget.Most - own) * Headroom(now, limits)) } : budget;
    }

    // How much of the slack may be spent for the cache's sake. Blocks are held for as long as an answer takes; what finetuning adds to that
    // comes back as a queue, which no later step could make good in time.
    private static double Headroom(EngineSnapshot now, StepLimits limits) =>
        now.Sequences.IsEmpty || limits.FreeBlocksShare == 0.0
            ? 1.0
            : Math.Min(1.0, (double)now.FreeBlocks / now.TotalBlocks / limits.FreeBlocksShare);

    /// <summary>
    /// Fills the budget. A forward window and a backward item cost something before their first row: what would be mostly that
    /// is left for a later step, of a larger budget or with the other kind of work done; time that is not spent is not lost.
    /// </summary>
    public static FinetunePlan Fill(
        EngineSnapshot now, StepFeatures inference, FinetuneBudget budget, StepLimits limits, in LatencyModel latency,
        PlannerScratch scratch)
    {
        var step = new Step(budget.Most, limits, latency, scratch.Forward, scratch.Backward);
        StepFeatures features = inference;
        List<int> order = scratch.Jobs;
        OrderJobs(now, order);
        foreach (int index in order)
        {
            features = Add(step, now.Jobs[index], features);
        }

        bool waits = budget.Grows && now.StepsSinceFinetuning < limits.ThriftStepsMax;
        for (int i = 0; i < order.Count && step.IsEmpty && !waits; i++)
        {
            features = Add(step with { FixedShareMax = 1.0 }, now.Jobs[order[i]], features);
        }

        if (now.Sequences.IsEmpty && order.Count > 0 && step.IsEmpty)
        {
            AddLeast(now.Jobs[order[0]], step, ref features);
        }

        return new FinetunePlan(scratch.Forward.ToImmutable(), scratch.Backward.ToImmutable(), features);
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
        TimeSpan spare = (untilDeadline - (own * steps)) / steps * (1.0 - limits.PromptHeldBack);
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

    // What is behind goes first, so that the sample ahead is done when the one before it is; what one leaves is the other's.
    private static StepFeatures Add(in Step step, JobSnapshot job, StepFeatures features)
    {
        if (job.Phase == JobPhase.Forward)
        {
            return AddForward(step, job, features);
        }

        bool isBehind = job.ForwardTokensLeft > 0 && (double)job.AheadDone / job.AheadTokens < BackwardShare(job);
        features = isBehind ? AddForward(step, job, features) : features;
        features = AddBackward(step, job, features);
        return !isBehind && job.ForwardTokensLeft > 0 ? AddForward(step, job, features) : features;
    }

    // How much of a sample's backward pass is done.
    private static double BackwardShare(in JobSnapshot job)
    {
        double left = job.RowsLeft + ((double)(job.Layer - job.LowestLayer) * job.SampleTokens);
        return 1.0 - (left / ((job.LayersAbove + 1.0) * job.SampleTokens));
    }

    /// <summary>As many tokens as fit, in one window.</summary>
    private static StepFeatures AddForward(in Step step, JobSnapshot job, StepFeatures features)
    {
        Check.That(job.ForwardTokensLeft > 0);
        StepFeatures before = features with { ForwardWindows = features.ForwardWindows + 1 };
        int tokensMax = Math.Min(job.ForwardTokensLeft, step.Limits.TokensPerStepMax - features.BatchRows);
        int tokens = Bisection.Largest(
            tokensMax, new Search(before, job.ForwardStart, step.Most, step.Latency),
            static (in Search s, int n) => s.Latency.Predict(s.Before.WithLongerForward(s.Position, n)) <= s.Most);
        StepFeatures after = before.WithLongerForward(job.ForwardStart, tokens);
        if (tokens <= 0 || (tokens < tokensMax && !step.IsThrifty(features, after)))
        {
            return features;
        }

        step.Forward.Add(new ForwardWindow(job.Id, tokens));
        return after;
    }

    private static StepFeatures AddBackward(in Step step, JobSnapshot job, StepFeatures features)
    {
        Check.That(job.RowsLeft > 0 && job.RowsLeft <= job.SampleTokens && job.Layer >= job.LowestLayer);
        StepFeatures after = features;
        int items = step.Backward.Count;
        int rowsLeft = job.RowsLeft;
        bool fits = true;
        for (int layer = job.Layer; layer >= job.LowestLayer && fits; layer--, rowsLeft = job.SampleTokens)
        {
            while (rowsLeft > 0 && fits)
            {
                int rows = BackwardRows(step, after, rowsLeft);
                fits = rows > 0;
                if (fits)
                {
                    rowsLeft -= rows;
                    step.Backward.Add(new BackwardWindow(job.Id, layer, rowsLeft, rows));
                    after = after.WithBackward(rowsLeft, rows);
                }
            }
        }

        // A whole layer does not get cheaper by waiting.
        if (after.BackwardRows - features.BackwardRows >= job.RowsLeft || step.IsThrifty(features, after))
        {
            return after;
        }

        step.Backward.Count = items;
        return features;
    }

    // Rows that end at this position, as many as fit into an item and into the step.
    private static int BackwardRows(in Step step, in StepFeatures before, int end)
    {
        TimeSpan itemEnd = step.Latency.Predict(before) + step.Limits.BackwardItemTimeMax;
        int most = Math.Min(end, step.Limits.BackwardRowsMax);
        most = Math.Max(1, BackwardRows(most, new Search(before, end, itemEnd, step.Latency)));
        return BackwardRows(most, new Search(before, end, step.Most, step.Latency));
    }

    private static int BackwardRows(int max, in Search search) => Bisection.Largest(
        max, search, static (in Search s, int n) => s.Latency.Predict(s.Before.WithBackward(s.Position - n, n)) <= s.Most);

    /// <summary>
    /// The least work there is. An idle machine always does it: a model that expects too much would never learn better.
    /// </summary>
    private static void AddLeast(JobSnapshot job, in Step step, ref StepFeatures features)
    {
        if (job.Phase == JobPhase.Forward)
        {
            step.Forward.Add(new ForwardWindow(job.Id, 1));
            features = features.WithForward(job.PositionsDone, 1);
        }
        else
        {
            step.Backward.Add(new BackwardWindow(job.Id, job.Layer, job.RowsLeft - 1, 1));
            features = features.WithBackward(job.RowsLeft - 1, 1);
        }
    }

    // A step that is being filled up to a time.
    private readonly record struct Step(
        TimeSpan Most, StepLimits Limits, LatencyModel Latency, ImmutableArray<ForwardWindow>.Builder Forward,
        ImmutableArray<BackwardWindow>.Builder Backward)
    {
        public double FixedShareMax { get; init; } = Limits.FixedShareMax;

        public bool IsEmpty => Forward.Count + Backward.Count == 0;

        /// <summary>Whether enough of what work adds to the step is for rows.</summary>
        public bool IsThrifty(in StepFeatures before, in StepFeatures after) =>
            Latency.PredictFixed(after) - Latency.PredictFixed(before) <=
            (Latency.Predict(after) - Latency.Predict(before)) * FixedShareMax;
    }

    // A search for the most rows at a position; backward, the position is their end.
    private readonly record struct Search(StepFeatures Before, int Position, TimeSpan Most, LatencyModel Latency);
}
