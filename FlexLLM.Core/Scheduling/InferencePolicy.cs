using System.Collections.Immutable;
using FlexLLM.Primitives;

namespace FlexLLM.Scheduling;

/// <summary>A sequence, by its index in the snapshot, with the tokens of its prompt that are left after the step.</summary>
internal readonly record struct PromptLeft(int Index, int TokensLeft);

/// <summary>The inference part of a plan, and what stage 2 must know about it.</summary>
internal readonly record struct InferencePlan
{
    public required ImmutableArray<SequenceId> Preemptions { get; init; }

    public required ImmutableArray<SequenceId> Admissions { get; init; }

    public required ImmutableArray<InferenceWork> Work { get; init; }

    public required StepFeatures Features { get; init; }

    /// <summary>Sequences with a prompt to compute, first come first; the scratch object's, until its next use.</summary>
    public required List<PromptLeft> Prompts { get; init; }

    /// <summary>Prompt tokens in this step.</summary>
    public required int PromptTokens { get; init; }
}

/// <summary>
/// Stage 1: places inference without a look at finetuning. Every decoding sequence gets its token, prompts fill what tokens,
/// blocks and the decoders' time leave, in one order that never changes: arrival, put forward by priority. The first in
/// that order always makes progress, so all finish. Where several tenants wait, the places that waiting sequences of one
/// priority have in the order go to the tenant that had least so far (Sheng et al., OSDI'24).
/// </summary>
internal static class InferencePolicy
{
    public static InferencePlan Fill(EngineSnapshot now, StepLimits limits, in LatencyModel latency, PlannerScratch scratch)
    {
        ReadOnlySpan<SequenceSnapshot> sequences = now.Sequences.AsSpan();
        Span<OrderKey> order = scratch.Order.AsSpan(0, sequences.Length);
        Span<PlanMarks> marks = scratch.Marks.AsSpan(0, sequences.Length);
        Span<int> left = scratch.TokensLeft.AsSpan(0, sequences.Length);
        for (int i = 0; i < sequences.Length; i++)
        {
            // Earlier arrival first, each level of priority worth some waiting, and so is what the cache has of a sequence.
            TimeSpan place = sequences[i].ArrivalTime - (limits.AgeingPerPriority * sequences[i].Priority);
            if (sequences[i].Phase == SequencePhase.Waiting)
            {
                place -= limits.PrefixCreditMax * sequences[i].TokensComputed / sequences[i].TokensTotal;
            }

            order[i] = new OrderKey(place.Ticks, sequences[i].Id.Value, i);
            left[i] = sequences[i].TokensLeft;
        }

        order.Sort();
        CheckDoor(now, sequences);
        int free = now.FreeBlocks + Preempt(now, sequences, order, marks, latency);
        StepFeatures features = default;
        int running = 0;
        long demand = SharedBlocks(now, sequences); // Blocks of all that run, each grown by the horizon.
        foreach (OrderKey key in order)
        {
            ref readonly SequenceSnapshot s = ref sequences[key.Index];
            if (s.Phase != SequencePhase.Running || marks[key.Index] != PlanMarks.None)
            {
                continue;
            }

            running++;
            demand += GrownBlocks(now, s, limits.GrowthHorizon);
            if (s.IsDecoding)
            {
                free -= BlocksToAdd(now, s, 1);
                features = features.WithInference(s.TokensComputed, 1, sampled: 1);
                scratch.Work.Add(new InferenceWork(s.Id, 1, s.TokensComputed));
                left[key.Index]--;
            }
        }

        Check.That(free >= 0);
        Check.That(scratch.Work.Count <= limits.TokensPerStepMax);
        int decodes = scratch.Work.Count;
        TimeSpan? timeMax = DecodeTimeMax(now, sequences, marks, limits, features, latency, out bool isStrict);
        bool admits = !marks.Contains(PlanMarks.Preempted); // Admitting into a full cache would only preempt again.
        int passed = 0;
        for (int place = 0; place < order.Length; place++)
        {
            int i = order[place].Index;
            bool waits = sequences[i].Phase == SequencePhase.Waiting;
            if ((marks[i] & PlanMarks.Preempted) != 0 || sequences[i].IsDecoding || (waits && !admits))
            {
                continue;
            }

            i = waits ? NextOfFairest(now, sequences, order, scratch, sequences[i].Priority, limits) : i;
            marks[i] |= waits ? PlanMarks.Considered : PlanMarks.None;
            ref readonly SequenceSnapshot sequence = ref sequences[i];
            int tokensMax = Math.Min(limits.TokensPerStepMax - features.InferenceRows, limits.PrefillChunkMax);
            int tokens = Math.Min(sequence.TokensLeft, tokensMax);
            int tokensMin = isStrict || decodes < scratch.Work.Count ? 0 : limits.PrefillChunkMin;
            tokens = WithinTime(tokens, sequence, features, timeMax, tokensMin, latency);
            if (waits)
            {
                admits = tokens > 0 && running < limits.SequencesMax;
                int stepsMore = (sequence.TokensLeft - tokens) / Math.Max(1, limits.TokensPerStepMax - decodes);
                if (!admits || !Fits(now, sequences, marks, i, stepsMore, limits.GrowthHorizon, demand))
                {
                    // Smaller ones may pass, but few, and not for long.
                    admits &= ++passed <= limits.SkipAheadMax && now.Now - sequence.ArrivalTime < limits.SkipAheadWaitMax;
                    continue;
                }
            }

            long room = ((long)(sequence.BlocksTaken + free) * now.TokensPerBlock) - sequence.TokensComputed;
            tokens = (int)Math.Min(tokens, room);
            if (tokens <= 0)
            {
                continue;
            }

            free -= BlocksToAdd(now, sequence, tokens);
            features = features.WithInference(sequence.TokensComputed, tokens, SampledOf(sequence.TokensLeft, tokens));
            scratch.Work.Add(new InferenceWork(sequence.Id, tokens, sequence.TokensComputed));
            left[i] -= tokens;
            if (waits)
            {
                marks[i] |= PlanMarks.Admitted;
                running++;
                demand += GrownBlocks(now, sequence, limits.GrowthHorizon);
                Charge(now, sequence, scratch);
            }
        }

        foreach (OrderKey key in order)
        {
            if (!sequences[key.Index].IsDecoding || sequences[key.Index].FirstTokenTime is null)
            {
                scratch.Prompts.Add(new PromptLeft(key.Index, left[key.Index]));
            }
        }

        return new InferencePlan
        {
            Preemptions = Ids(sequences, order, scratch, PlanMarks.Preempted),
            Admissions = Ids(sequences, order, scratch, PlanMarks.Admitted),
            Work = scratch.Work.ToImmutable(),
            Features = features,
            Prompts = scratch.Prompts,
            PromptTokens = features.InferenceRows - decodes,
        };
    }

    private static void CheckDoor(EngineSnapshot now, ReadOnlySpan<SequenceSnapshot> sequences)
    {
        int own = 0;
        long held = 0;
        foreach (ref readonly SequenceSnapshot s in sequences)
        {
            Check.That(s.TokensComputed >= 0 && s.TokensLeft >= 1 && s.TokensTotal <= s.TokensMax);
            Check.That(s.Phase == SequencePhase.Running || s.TokensComputed == (long)s.BlocksHeld * now.TokensPerBlock);
            Check.That(s.BlocksHeld >= now.BlocksFor(s.TokensComputed) && s.BlocksShared >= 0 && s.BlocksOwn >= 0);
            Check.That(now.BlocksFor(s.TokensMax) <= now.TotalBlocks); // Else it could never finish: refused at the door.
            Check.That(now.Tenants.IsEmpty || (uint)s.Tenant < (uint)now.Tenants.Length);
            if (s.Phase == SequencePhase.Running)
            {
                own += s.BlocksOwn;
                held += s.BlocksHeld;
            }
        }

        Check.That(now.FreeBlocks + own <= now.TotalBlocks && now.FreeBlocks + held >= now.TotalBlocks);
    }

    /// <summary>
    /// Who of the waiting sequences of a priority is next: the first of the tenant with the least service, where a tenant that has
    /// got nothing for too long counts as one that never had any; with one tenant, the first.
    /// </summary>
    private static int NextOfFairest(
        EngineSnapshot now, ReadOnlySpan<SequenceSnapshot> sequences, ReadOnlySpan<OrderKey> order, PlannerScratch scratch,
        int priority, StepLimits limits)
    {
        int best = -1;
        double least = double.PositiveInfinity;
        foreach (OrderKey key in order)
        {
            ref readonly SequenceSnapshot s = ref sequences[key.Index];
            bool isOpen = s.Phase == SequencePhase.Waiting && (scratch.Marks[key.Index] & PlanMarks.Considered) == 0;
            if (!isOpen || s.Priority != priority)
            {
                continue;
            }

            if (now.Tenants.IsEmpty)
            {
                return key.Index;
            }

            TimeSpan since = scratch.TenantAdmitted[s.Tenant];
            bool isAged = now.Now - (since > s.ArrivalTime ? since : s.ArrivalTime) > limits.TenantWaitMax;
            double served = isAged ? double.NegativeInfinity : scratch.TenantServed[s.Tenant];
            if (best < 0 || served < least)
            {
                (best, least) = (key.Index, served);
            }
        }

        Check.That(best >= 0); // As many are taken as have places in the order.
        return best;
    }

    private static void Charge(EngineSnapshot now, in SequenceSnapshot admitted, PlannerScratch scratch)
    {
        if (!now.Tenants.IsEmpty)
        {
            scratch.TenantServed[admitted.Tenant] += admitted.ServiceDue / now.Tenants[admitted.Tenant].Weight;
            scratch.TenantAdmitted[admitted.Tenant] = now.Now;
        }
    }

    private static int BlocksToAdd(EngineSnapshot now, in SequenceSnapshot sequence, int tokens) =>
        Math.Max(0, now.BlocksFor(sequence.TokensComputed + tokens) - sequence.BlocksTaken);

    private static int SharedBlocks(EngineSnapshot now, ReadOnlySpan<SequenceSnapshot> sequences)
    {
        int shared = now.TotalBlocks - now.FreeBlocks;
        foreach (ref readonly SequenceSnapshot s in sequences)
        {
            shared -= s.Phase == SequencePhase.Running ? s.BlocksOwn : 0;
        }

        return shared;
    }

    /// <summary>
    /// Preempts until every decoding sequence, and the first of all, has room for its next token. Returns blocks freed.
    /// </summary>
    private static int Preempt(
        EngineSnapshot now, ReadOnlySpan<SequenceSnapshot> sequences, ReadOnlySpan<OrderKey> order, Span<PlanMarks> marks,
        in LatencyModel latency)
    {
        int first = 0;
        while (first < order.Length && sequences[order[first].Index].Phase != SequencePhase.Running)
        {
            first++;
        }

        int needed = 0;
        for (int place = first; place < order.Length; place++)
        {
            ref readonly SequenceSnapshot s = ref sequences[order[place].Index];
            needed += s.IsDecoding || place == first ? BlocksToAdd(now, s, 1) : 0;
        }

        int freed = 0;
        while (needed > now.FreeBlocks + freed)
        {
            int victim = Victim(now, sequences, order, marks, first, latency);
            if (victim < 0)
            {
                // What victims share with each other is free too when only the first is left, and the first alone fits: the door refuses
                // what does not.
                freed = now.TotalBlocks - now.FreeBlocks - sequences[order[first].Index].BlocksHeld;
                Check.That(needed <= now.FreeBlocks + freed);
                break;
            }

            marks[victim] |= PlanMarks.Preempted;
            freed += sequences[victim].BlocksOwn;
            needed -= sequences[victim].IsDecoding ? BlocksToAdd(now, sequences[victim], 1) : 0;
        }

        return freed;
    }

    /// <summary>
    /// Who loses least: the lowest priority, then the most slack after all that it must compute again, then the last in order;
    /// never the first of all.
    /// </summary>
    private static int Victim(
        EngineSnapshot now, ReadOnlySpan<SequenceSnapshot> sequences, ReadOnlySpan<OrderKey> order, ReadOnlySpan<PlanMarks> marks,
        int first, in LatencyModel latency)
    {
        int victim = -1;
        TimeSpan most = default;
        for (int place = order.Length - 1; place > first; place--)
        {
            int i = order[place].Index;
            ref readonly SequenceSnapshot s = ref sequences[i];
            bool helps = s.BlocksHeld > 0 || s.IsDecoding;
            if (s.Phase != SequencePhase.Running || marks[i] != PlanMarks.None || !helps)
            {
                continue;
            }

            TimeSpan slack = s.TpotSlack(now.Now) ?? (s.ArrivalTime + s.TtftTarget - now.Now);
            TimeSpan kept = slack - latency.Expect(default(StepFeatures).WithInference(0, s.TokensComputed));
            if (victim < 0 || s.Priority < sequences[victim].Priority || (s.Priority == sequences[victim].Priority && kept > most))
            {
                (victim, most) = (i, kept);
            }
        }

        return victim;
    }

    /// <summary>
    /// How long prompts may make a step while others decode: what the tightest has saved, but always one TPOT target, since
    /// a late answer must not stop all new ones. Null where nobody decodes. An inter-token target is strict, counted from the last
    /// token, unless decoding alone breaks it: prompts then wait for a step or for the end of that answer, and only a target that is
    /// lost anyway stops nobody.
    /// </summary>
    private static TimeSpan? DecodeTimeMax(
        EngineSnapshot now, ReadOnlySpan<SequenceSnapshot> sequences, ReadOnlySpan<PlanMarks> marks, StepLimits limits,
        in StepFeatures decodes, in LatencyModel latency, out bool isStrict)
    {
        TimeSpan decodeTime = latency.Predict(decodes);
        TimeSpan? tightest = null;
        TimeSpan? strictest = null;
        for (int i = 0; i < sequences.Length; i++)
        {
            ref readonly SequenceSnapshot s = ref sequences[i];
            if (s.IsDecoding && marks[i] == PlanMarks.None && s.TpotSlack(now.Now, limits.TpotPlanned) is TimeSpan slack)
            {
                TimeSpan target = s.TpotTarget;
                TimeSpan most = target * Math.Max(1.0, limits.SlackTargetsMax);
                TimeSpan allowed = slack < target ? target : slack > most ? most : slack;
                tightest = tightest is null || allowed < tightest ? allowed : tightest;
                if (s.InterTokenTarget >= decodeTime && s.InterTokenSlack(now.Now) is TimeSpan untilToken)
                {
                    strictest = strictest <= untilToken ? strictest : untilToken;
                }
            }
        }

        isStrict = strictest is not null;
        return strictest < tightest ? strictest : tightest;
    }

    private static int WithinTime(
        int tokens, in SequenceSnapshot sequence, in StepFeatures features, TimeSpan? timeMax, int tokensMin, in LatencyModel latency)
    {
        if (timeMax is not TimeSpan most)
        {
            return tokens;
        }

        int fitting = Bisection.Largest(
            tokens, (features, sequence.TokensComputed, sequence.TokensLeft, most, latency),
            static (in (StepFeatures Before, int Start, int Left, TimeSpan Most, LatencyModel Latency) s, int n) =>
                s.Latency.Predict(s.Before.WithInference(s.Start, n, SampledOf(s.Left, n))) <= s.Most);
        return Math.Max(fitting, Math.Min(tokens, tokensMin));
    }

    // The row that ends what is known of a sequence tells its next token.
    private static int SampledOf(int tokensLeft, int tokens) => tokens == tokensLeft ? 1 : 0;

    /// <summary>
    /// Whether all that run, and this one, can grow by so many tokens without a preemption (paper.md e.2, per step): as many as
    /// its prompt takes steps, at least the horizon.
    /// </summary>
    private static bool Fits(
        EngineSnapshot now, ReadOnlySpan<SequenceSnapshot> sequences, ReadOnlySpan<PlanMarks> marks, int candidate, int steps,
        int horizon, long demandAtHorizon)
    {
        if (steps <= horizon)
        {
            return demandAtHorizon + GrownBlocks(now, sequences[candidate], horizon) <= now.TotalBlocks;
        }

        long demand = SharedBlocks(now, sequences);
        for (int i = 0; i < sequences.Length; i++)
        {
            bool runs = sequences[i].Phase == SequencePhase.Running && marks[i] == PlanMarks.None;
            bool counts = i == candidate || runs || (marks[i] & PlanMarks.Admitted) != 0;
            demand += counts ? GrownBlocks(now, sequences[i], steps) : 0;
        }

        return demand <= now.TotalBlocks;
    }

    // Without the shared ones, which count once for all.
    private static int GrownBlocks(EngineSnapshot now, in SequenceSnapshot s, int tokens) =>
        Math.Max(s.BlocksHeld, now.BlocksFor((int)Math.Min(s.TokensMax, (long)s.TokensTotal + tokens))) - s.BlocksShared;

    private static ImmutableArray<SequenceId> Ids(
        ReadOnlySpan<SequenceSnapshot> sequences, ReadOnlySpan<OrderKey> order, PlannerScratch scratch, PlanMarks mark)
    {
        scratch.Ids.Clear();
        foreach (OrderKey key in order)
        {
            if ((scratch.Marks[key.Index] & mark) != 0)
            {
                scratch.Ids.Add(sequences[key.Index].Id);
            }
        }

        return scratch.Ids.ToImmutable();
    }
}
