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
    /// <summary>How long its batch may take, forward windows included: tokens are delivered before backward items.</summary>
    public TimeSpan BatchMost { get; init; } = TimeSpan.MaxValue;

    /// <summary>The lesser of this and another bound.</summary>
    public FinetuneBudget Within(TimeSpan most, bool grows) => most < Most ? this with { Most = most, Grows = grows } : this;

    /// <summary>The lesser of this and another bound for the batch.</summary>
    public FinetuneBudget WithinBatch(TimeSpan most) => most < BatchMost ? this with { BatchMost = most } : this;
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
        if (now.Sequences.IsEmpty)
        {
            return new FinetuneBudget(limits.IdleFinetuningMax, Grows: false);
        }

        TimeSpan own = latency.Predict(inference.Features);
        var budget = new FinetuneBudget(own + limits.IdleStepMax, Grows: false);
        TimeSpan chunk = latency.Predict(inference.Features.WithInference(0, limits.PrefillChunkMin, sampled: 0));
        bool isStrict = false;
        foreach (ref readonly SequenceSnapshot s in now.Sequences.AsSpan())
        {
            if (s.IsDecoding && s.FirstTokenTime is not null && s.InterTokenSlack(now.Now) is TimeSpan untilToken)
            {
                // The whole step bounds the items after the token: the next one needs about the same batch again.
                budget = budget.WithinBatch(untilToken).Within(s.InterTokenTarget!.Value, grows: false);
                isStrict = true;
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
            if (isStrict && tokensLeft > 0 && inference.PromptTokens == 0)
            {
                // It may be backward items that have left no time for a chunk before the next token: not a second time.
                budget = budget.Within(own, grows: false);
            }

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
    // comes back as a queue, which no later step could make good in time. Few requests, though, fill a cache because they are long or it is
    // small: a job must not stand still for as long as they stay. Who waits for their blocks ends finetuning as any prompt does.
    private static double Headroom(EngineSnapshot now, StepLimits limits)
    {
        double free = (double)now.FreeBlocks / now.TotalBlocks;
        if (free >= limits.FreeBlocksShare)
        {
            return 1.0;
        }

        double share = free <= limits.FreeBlocksMin ? 0.0
            : (free - limits.FreeBlocksMin) / (limits.FreeBlocksShare - limits.FreeBlocksMin);
        return Math.Max(share, 1.0 / now.Sequences.Length);
    }

    /// <summary>
    /// Fills the budget. A forward window and a backward item cost something before their first row: what would be mostly that
    /// is left for a later step, of a larger budget or with the other kind of work done; time that is not spent is not lost.
    /// </summary>
    public static FinetunePlan Fill(
        EngineSnapshot now, StepFeatures inference, FinetuneBudget budget, StepLimits limits, in LatencyModel latency,
        PlannerScratch scratch)
    {
        var step = new Step(budget, limits, latency, scratch.Forward, scratch.Backward);
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
            features = AddLeast(step, now.Jobs[order[0]], features);
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
        int tokens = ForwardTokens(tokensMax, new Search(before, job.ForwardStart, step.Most, step.Latency));
        if (step.Budget.BatchMost < TimeSpan.MaxValue)
        {
            tokens = ForwardTokens(
                tokens, new Search(before.WithoutBackward(), job.ForwardStart, step.Budget.BatchMost, step.Latency));
        }

        StepFeatures after = before.WithLongerForward(job.ForwardStart, tokens);
        if (tokens <= 0 || (tokens < tokensMax && !step.IsThrifty(features, after)))
        {
            return features;
        }

        step.Forward.Add(new ForwardWindow(job.Id, tokens));
        return after;
    }

    private static int ForwardTokens(int max, in Search search) => Bisection.Largest(
        max, search, static (in Search s, int n) => s.Latency.Predict(s.Before.WithLongerForward(s.Position, n)) <= s.Most);

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
    private static int BackwardRows(in Step step, in StepFeatures before, int end) =>
        BackwardRows(ItemRows(step, before, end), new Search(before, end, step.Most, step.Latency));

    // An item is cut for the sake of those who may call meanwhile, but not to less than pays.
    private static int ItemRows(in Step step, in StepFeatures before, int end)
    {
        TimeSpan pays = PayingTime(step.Latency, before, before.WithBackward(end - 1, 1));
        TimeSpan most = pays > step.Limits.BackwardItemTimeMax ? pays : step.Limits.BackwardItemTimeMax;
        int rowsMax = Math.Min(end, step.Limits.BackwardRowsMax);
        return Math.Max(1, BackwardRows(rowsMax, new Search(before, end, step.Latency.Predict(before) + most, step.Latency)));
    }

    private static int BackwardRows(int max, in Search search) => Bisection.Largest(
        max, search, static (in Search s, int n) => s.Latency.Predict(s.Before.WithBackward(s.Position - n, n)) <= s.Most);

    /// <summary>
    /// The time that rows may fill, of work that costs something before its first row: as long again as that. Then it is at most twice as
    /// slow for what it does as it could be, and takes at most twice as long as it must.
    /// </summary>
    private static TimeSpan PayingTime(in LatencyModel latency, in StepFeatures before, in StepFeatures withOneRow) =>
        (latency.PredictFixed(withOneRow) - latency.PredictFixed(before)) * 2.0;

    /// <summary>
    /// The least work that pays, for an idle machine always does some: a model that expects too much would never learn better, and one
    /// that is right, of a machine that reads its weights for longer than an idle step may take, has nothing to wait for.
    /// </summary>
    private static StepFeatures AddLeast(in Step step, JobSnapshot job, StepFeatures features)
    {
        if (job.Phase == JobPhase.Forward)
        {
            StepFeatures before = features with { ForwardWindows = features.ForwardWindows + 1 };
            TimeSpan most = step.Latency.Predict(features) +
                PayingTime(step.Latency, features, features.WithForward(job.PositionsDone, 1));
            int tokensMax = Math.Min(job.ForwardTokensLeft, step.Limits.TokensPerStepMax - features.BatchRows);
            int tokens = Math.Max(1, ForwardTokens(tokensMax, new Search(before, job.PositionsDone, most, step.Latency)));
            step.Forward.Add(new ForwardWindow(job.Id, tokens));
            return before.WithLongerForward(job.PositionsDone, tokens);
        }

        int rows = ItemRows(step, features, job.RowsLeft);
        step.Backward.Add(new BackwardWindow(job.Id, job.Layer, job.RowsLeft - rows, rows));
        return features.WithBackward(job.RowsLeft - rows, rows);
    }

    // A step that is being filled up to a time.
    private readonly record struct Step(
        FinetuneBudget Budget, StepLimits Limits, LatencyModel Latency, ImmutableArray<ForwardWindow>.Builder Forward,
        ImmutableArray<BackwardWindow>.Builder Backward)
    {
        public TimeSpan Most => Budget.Most;

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
