using System.Collections.Immutable;
using FlexLLM.Primitives;

namespace FlexLLM.Scheduling;

/// <summary>The inference part of a plan, and what stage 2 must know about it.</summary>
internal sealed record InferencePlan
{
    public required ImmutableArray<SequenceId> Preemptions { get; init; }

    public required ImmutableArray<SequenceId> Admissions { get; init; }

    public required ImmutableArray<InferenceWork> Work { get; init; }

    public required StepFeatures Features { get; init; }

    /// <summary>Sequences with a prompt to compute, first come first, each with its tokens left after this step.</summary>
    public required ImmutableArray<(SequenceSnapshot Sequence, int TokensLeft)> Prompts { get; init; }

    /// <summary>Prompt tokens in this step.</summary>
    public required int PromptTokens { get; init; }
}

/// <summary>
/// Stage 1: places inference without a look at finetuning. Every decoding sequence gets its token, prompts fill what tokens,
/// blocks and the decoders' time leave, in one order that never changes: arrival, put forward by priority. The first in
/// that order always makes progress, so all finish.
/// </summary>
internal static class InferencePolicy
{
    public static InferencePlan Fill(EngineSnapshot now, StepLimits limits, in LatencyModel latency)
    {
        SequenceSnapshot[] order = [.. now.Sequences];
        Array.Sort(order, (a, b) => Compare(a, b, limits));
        CheckDoor(now, order);

        bool[] preempted = new bool[order.Length];
        int free = now.FreeBlocks + Preempt(now, order, preempted);
        int[] left = [.. order.Select(s => s.TokensLeft)];
        var work = ImmutableArray.CreateBuilder<InferenceWork>(order.Length);
        StepFeatures features = default;
        int running = 0;
        for (int i = 0; i < order.Length; i++)
        {
            running += order[i].Phase == SequencePhase.Running && !preempted[i] ? 1 : 0;
            if (order[i].IsDecoding && !preempted[i])
            {
                free -= BlocksToAdd(now, order[i], 1);
                features = features.WithInference(order[i].TokensComputed, 1, sampled: 1);
                work.Add(new InferenceWork(order[i].Id, 1, order[i].TokensComputed));
                left[i]--;
            }
        }

        Check.That(free >= 0);
        Check.That(work.Count <= limits.TokensPerStepMax);
        int decodes = work.Count;
        TimeSpan? timeMax = DecodeTimeMax(now, order, preempted, limits);
        bool admits = !preempted.Contains(true); // Admitting into a full cache would only preempt again.
        bool[] admitted = new bool[order.Length];
        int passed = 0;
        for (int i = 0; i < order.Length; i++)
        {
            SequenceSnapshot sequence = order[i];
            bool waits = sequence.Phase == SequencePhase.Waiting;
            if (preempted[i] || sequence.IsDecoding || (waits && !admits))
            {
                continue;
            }

            int tokensMax = Math.Min(limits.TokensPerStepMax - features.InferenceRows, limits.PrefillChunkMax);
            int tokens = Math.Min(sequence.TokensLeft, tokensMax);
            tokens = WithinTime(tokens, sequence, features, timeMax, decodes == work.Count ? limits.PrefillChunkMin : 0, latency);
            if (waits)
            {
                admits = tokens > 0 && running < limits.SequencesMax;
                int stepsMore = (sequence.TokensLeft - tokens) / Math.Max(1, limits.TokensPerStepMax - decodes);
                if (!admits || !Fits(now, order, preempted, admitted, i, Math.Max(stepsMore, limits.GrowthHorizon)))
                {
                    // Smaller ones may pass, but few, and not for long.
                    admits &= ++passed <= limits.SkipAheadMax && now.Now - sequence.ArrivalTime < limits.SkipAheadWaitMax;
                    continue;
                }
            }

            long room = ((long)(sequence.BlocksHeld + free) * now.TokensPerBlock) - sequence.TokensComputed;
            tokens = (int)Math.Min(tokens, room);
            if (tokens <= 0)
            {
                continue;
            }

            free -= BlocksToAdd(now, sequence, tokens);
            features = features.WithInference(sequence.TokensComputed, tokens, SampledOf(sequence, tokens));
            work.Add(new InferenceWork(sequence.Id, tokens, sequence.TokensComputed));
            left[i] -= tokens;
            admitted[i] = waits;
            running += waits ? 1 : 0;
        }

        return new InferencePlan
        {
            Preemptions = Ids(order, preempted),
            Admissions = Ids(order, admitted),
            Work = work.ToImmutable(),
            Features = features,
            Prompts = [.. order.Zip(left).Where(pair => !pair.First.IsDecoding || pair.First.FirstTokenTime is null)],
            PromptTokens = features.InferenceRows - decodes,
        };
    }

    /// <summary>The one order of all sequences: earlier arrival first, each level of priority worth some waiting.</summary>
    private static int Compare(in SequenceSnapshot a, in SequenceSnapshot b, StepLimits limits)
    {
        int byTime = (a.ArrivalTime - (limits.AgeingPerPriority * a.Priority))
            .CompareTo(b.ArrivalTime - (limits.AgeingPerPriority * b.Priority));
        return byTime != 0 ? byTime : a.Id.Value.CompareTo(b.Id.Value);
    }

    private static void CheckDoor(EngineSnapshot now, SequenceSnapshot[] order)
    {
        int held = 0;
        foreach (SequenceSnapshot s in order)
        {
            Check.That(s.TokensComputed >= 0 && s.TokensLeft >= 1 && s.TokensTotal <= s.TokensMax);
            Check.That(s.Phase == SequencePhase.Running || (s.TokensComputed == 0 && s.BlocksHeld == 0));
            Check.That(s.BlocksHeld >= now.BlocksFor(s.TokensComputed));
            Check.That(now.BlocksFor(s.TokensMax) <= now.TotalBlocks); // Else it could never finish: refused at the door.
            held += s.BlocksHeld;
        }

        Check.That(now.FreeBlocks + held == now.TotalBlocks);
    }

    private static int BlocksToAdd(EngineSnapshot now, in SequenceSnapshot sequence, int tokens) =>
        Math.Max(0, now.BlocksFor(sequence.TokensComputed + tokens) - sequence.BlocksHeld);

    /// <summary>
    /// Preempts until every decoding sequence, and the first of all, has room for its next token. Returns blocks freed.
    /// </summary>
    private static int Preempt(EngineSnapshot now, SequenceSnapshot[] order, bool[] preempted)
    {
        int first = Array.FindIndex(order, s => s.Phase == SequencePhase.Running);
        int needed = 0;
        for (int i = 0; i < order.Length; i++)
        {
            needed += MustProgress(i) ? BlocksToAdd(now, order[i], 1) : 0;
        }

        int freed = 0;
        while (needed > now.FreeBlocks + freed)
        {
            int victim = Victim(now, order, preempted, first);
            Check.That(victim >= 0); // The first alone fits: the door refuses what does not.
            preempted[victim] = true;
            freed += order[victim].BlocksHeld;
            needed -= MustProgress(victim) ? BlocksToAdd(now, order[victim], 1) : 0;
        }

        return freed;

        bool MustProgress(int i) => order[i].IsDecoding || i == first;
    }

    /// <summary>
    /// Who loses least: the lowest priority, then the most slack, then the last in order; never the first of all.
    /// </summary>
    private static int Victim(EngineSnapshot now, SequenceSnapshot[] order, bool[] preempted, int first)
    {
        int victim = -1;
        for (int i = order.Length - 1; i > first; i--)
        {
            bool helps = order[i].BlocksHeld > 0 || order[i].IsDecoding;
            if (order[i].Phase != SequencePhase.Running || preempted[i] || !helps)
            {
                continue;
            }

            if (victim < 0 || order[i].Priority < order[victim].Priority ||
                (order[i].Priority == order[victim].Priority && Slack(order[i]) > Slack(order[victim])))
            {
                victim = i;
            }
        }

        return victim;

        TimeSpan Slack(in SequenceSnapshot s) => s.TpotSlack(now.Now) ?? (s.ArrivalTime + s.TtftTarget - now.Now);
    }

    /// <summary>
    /// How long prompts may make a step while others decode: what the tightest has saved, but always one TPOT target, since
    /// a late answer must not stop all new ones. Null where nobody decodes.
    /// </summary>
    private static TimeSpan? DecodeTimeMax(EngineSnapshot now, SequenceSnapshot[] order, bool[] preempted, StepLimits limits)
    {
        TimeSpan? tightest = null;
        for (int i = 0; i < order.Length; i++)
        {
            if (order[i].IsDecoding && !preempted[i] && order[i].TpotSlack(now.Now) is TimeSpan slack)
            {
                TimeSpan target = order[i].TpotTarget;
                TimeSpan spendable = slack * (1.0 - limits.SlackHeldBack);
                TimeSpan most = target * Math.Max(1.0, limits.SlackTargetsMax);
                TimeSpan allowed = spendable < target ? target : spendable > most ? most : spendable;
                tightest = tightest is null || allowed < tightest ? allowed : tightest;
            }
        }

        return tightest;
    }

    private static int WithinTime(
        int tokens, SequenceSnapshot sequence, StepFeatures features, TimeSpan? timeMax, int tokensMin, LatencyModel latency)
    {
        if (timeMax is not TimeSpan most)
        {
            return tokens;
        }

        int fitting = Bisection.Largest(
            tokens, n => latency.Predict(features.WithInference(sequence.TokensComputed, n, SampledOf(sequence, n))) <= most);
        return Math.Max(fitting, Math.Min(tokens, tokensMin));
    }

    // The row that ends what is known of a sequence tells its next token.
    private static int SampledOf(in SequenceSnapshot sequence, int tokens) => tokens == sequence.TokensLeft ? 1 : 0;

    /// <summary>
    /// Whether all that run, and this one, can grow by so many tokens without a preemption (paper.md e.2, per step).
    /// </summary>
    private static bool Fits(
        EngineSnapshot now, SequenceSnapshot[] order, bool[] preempted, bool[] admitted, int candidate, int growth)
    {
        long demand = 0;
        for (int i = 0; i < order.Length; i++)
        {
            SequenceSnapshot s = order[i];
            if (i == candidate || admitted[i] || (s.Phase == SequencePhase.Running && !preempted[i]))
            {
                int tokens = (int)Math.Min(s.TokensMax, (long)s.TokensTotal + growth);
                demand += Math.Max(s.BlocksHeld, now.BlocksFor(tokens));
            }
        }

        return demand <= now.TotalBlocks;
    }

    private static ImmutableArray<SequenceId> Ids(SequenceSnapshot[] order, bool[] chosen) =>
        [.. order.Where((_, i) => chosen[i]).Select(s => s.Id)];
}
