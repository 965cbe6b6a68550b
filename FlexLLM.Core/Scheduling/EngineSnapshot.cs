using System.Collections.Immutable;
using FlexLLM.Primitives;

namespace FlexLLM.Scheduling;

/// <summary>Names one inference sequence for as long as the engine runs.</summary>
internal readonly record struct SequenceId(long Value);

/// <summary>Names one finetuning job for as long as the engine runs.</summary>
internal readonly record struct JobId(long Value);

/// <summary>Whether a sequence holds a place in the engine.</summary>
internal enum SequencePhase
{
    /// <summary>Not admitted yet, or preempted: it holds no blocks, but some may hold what it needs.</summary>
    Waiting,

    /// <summary>Admitted: prefilling or decoding.</summary>
    Running,
}

/// <summary>One inference sequence as the planner sees it. Times count from the engine's start.</summary>
internal readonly record struct SequenceSnapshot
{
    public required SequenceId Id { get; init; }

    public required SequencePhase Phase { get; init; }

    /// <summary>Tokens known: the prompt and what was generated so far.</summary>
    public required int TokensTotal { get; init; }

    /// <summary>
    /// Tokens whose keys and values are stored; less than TokensTotal. Of a waiting sequence those that others left or share, whole
    /// blocks of them.
    /// </summary>
    public int TokensComputed { get; init; }

    /// <summary>The most tokens it can come to: prompt and generation limit.</summary>
    public required int TokensMax { get; init; }

    /// <summary>KV blocks held, or that it would hold at once if it were admitted.</summary>
    public int BlocksHeld { get; init; }

    /// <summary>Those of them that others hold: nobody gets them if this sequence gives them up, nor are they taken from anybody.</summary>
    public int BlocksShared { get; init; }

    /// <summary>Higher goes first; each level is worth <see cref="StepLimits.AgeingPerPriority"/> of waiting.</summary>
    public int Priority { get; init; }

    public required TimeSpan ArrivalTime { get; init; }

    /// <summary>When the first token was delivered; null before.</summary>
    public TimeSpan? FirstTokenTime { get; init; }

    /// <summary>Tokens delivered so far.</summary>
    public int TokensGenerated { get; init; }

    /// <summary>Longest mean time between two tokens of this request.</summary>
    public required TimeSpan TpotTarget { get; init; }

    /// <summary>Longest time from arrival to the first token.</summary>
    public required TimeSpan TtftTarget { get; init; }

    /// <summary>Longest time between any two of its tokens; null where only the mean counts.</summary>
    public TimeSpan? InterTokenTarget { get; init; }

    /// <summary>
    /// When its last token was delivered: before the backward items of its step, whose time is the next token's. Null stands for now.
    /// </summary>
    public TimeSpan? LastTokenTime { get; init; }

    /// <summary>Index of its tenant in <see cref="EngineSnapshot.Tenants"/>.</summary>
    public int Tenant { get; init; }

    /// <summary>Service that its tenant is charged with on admission: its prompt, 0 when it was admitted before.</summary>
    public int ServiceDue { get; init; }

    /// <summary>Tokens known but not computed.</summary>
    public int TokensLeft => TokensTotal - TokensComputed;

    /// <summary>Of the held blocks, those that are not among the free ones: a waiting sequence has yet to take what is idle.</summary>
    public int BlocksTaken => Phase == SequencePhase.Running ? BlocksHeld : BlocksShared;

    /// <summary>Of the held blocks, those that are its own.</summary>
    public int BlocksOwn => BlocksHeld - BlocksShared;

    /// <summary>Running with one token to compute: it generates a token in every step.</summary>
    public bool IsDecoding => Phase == SequencePhase.Running && TokensLeft == 1;

    /// <summary>Longest time from now to the next token that keeps the inter-token target; null without one.</summary>
    public TimeSpan? InterTokenSlack(TimeSpan now) => InterTokenTarget + (LastTokenTime ?? now) - now;

    /// <summary>
    /// Longest time from now to the next token that keeps the mean so far within this share of the target; null before the first.
    /// </summary>
    public TimeSpan? TpotSlack(TimeSpan now, double share = 1.0) => FirstTokenTime + (TpotTarget * share * TokensGenerated) - now;
}

/// <summary>
/// A tenant with sequences in the engine, as the planner sees it: the virtual token counter of Sheng et al., OSDI'24.
/// </summary>
internal readonly record struct TenantSnapshot
{
    /// <summary>Service so far (prompt tokens, generated tokens twice) divided by its weight.</summary>
    public required double Served { get; init; }

    /// <summary>Share relative to other tenants; more than 0.</summary>
    public required double Weight { get; init; }

    /// <summary>When a sequence of it was last admitted.</summary>
    public TimeSpan LastAdmission { get; init; }
}

/// <summary>What a finetuning job could do next.</summary>
internal enum JobPhase
{
    /// <summary>Paused: nothing to schedule.</summary>
    Blocked,

    /// <summary>In the forward pass of a sample.</summary>
    Forward,

    /// <summary>In the backward pass of a sample, perhaps with the forward pass of the next one beside it.</summary>
    Backward,
}

/// <summary>One finetuning job as the planner sees it.</summary>
internal readonly record struct JobSnapshot
{
    public required JobId Id { get; init; }

    /// <summary>Share of the slack relative to other jobs; more than 0.</summary>
    public required double Weight { get; init; }

    public required JobPhase Phase { get; init; }

    /// <summary>Work done so far, in tokens; the job with the least per weight goes first.</summary>
    public long ServedTokens { get; init; }

    /// <summary>Tokens of the sample that is in the phase.</summary>
    public int SampleTokens { get; init; }

    /// <summary>Forward: tokens of the sample that went through all layers.</summary>
    public int PositionsDone { get; init; }

    /// <summary>Backward: tokens of the sample after it, which may go forward at the same time; 0 where that has to wait.</summary>
    public int AheadTokens { get; init; }

    /// <summary>Tokens of the sample ahead that went through all layers.</summary>
    public int AheadDone { get; init; }

    /// <summary>Backward: the layer at work, counting down to LowestLayer.</summary>
    public int Layer { get; init; }

    /// <summary>Backward: the last layer that needs a gradient.</summary>
    public int LowestLayer { get; init; }

    /// <summary>Backward: rows [0, RowsLeft) of Layer are still to do; a window is taken from their end.</summary>
    public int RowsLeft { get; init; }

    /// <summary>Layers of the model above LowestLayer.</summary>
    public int LayersAbove { get; init; }

    /// <summary>Tokens that can go forward.</summary>
    public int ForwardTokensLeft => Phase == JobPhase.Forward ? SampleTokens - PositionsDone : AheadTokens - AheadDone;

    /// <summary>Position of the first of them.</summary>
    public int ForwardStart => Phase == JobPhase.Forward ? PositionsDone : AheadDone;

    /// <summary>The one order of jobs: who had least for its weight first, ties by id.</summary>
    public bool GoesBefore(in JobSnapshot other)
    {
        Check.That(Weight > 0.0 && other.Weight > 0.0);
        int byService = (ServedTokens / Weight).CompareTo(other.ServedTokens / other.Weight);
        return byService != 0 ? byService < 0 : Id.Value < other.Id.Value;
    }
}

/// <summary>All that a plan depends on, besides limits and latency model. Immutable.</summary>
internal sealed record EngineSnapshot
{
    /// <summary>Time since the engine's start.</summary>
    public required TimeSpan Now { get; init; }

    /// <summary>Waiting and running sequences, in any order.</summary>
    public required ImmutableArray<SequenceSnapshot> Sequences { get; init; }

    /// <summary>Finetuning jobs, in any order.</summary>
    public ImmutableArray<JobSnapshot> Jobs { get; init; } = [];

    /// <summary>Steps with inference since the last one with finetuning.</summary>
    public int StepsSinceFinetuning { get; init; }

    /// <summary>What finetuning leaves of what requests have saved.</summary>
    public SlackReserve Reserve { get; init; }

    /// <summary>Tenants that sequences name by index; empty where all sequences are one tenant's.</summary>
    public ImmutableArray<TenantSnapshot> Tenants { get; init; } = [];

    /// <summary>KV blocks that no sequence holds, whether something is kept in them or not.</summary>
    public required int FreeBlocks { get; init; }

    /// <summary>KV blocks that sequences may hold: free ones and theirs.</summary>
    public required int TotalBlocks { get; init; }

    public required int TokensPerBlock { get; init; }

    /// <summary>Blocks that this many tokens need.</summary>
    public int BlocksFor(int tokens) => (int)(((long)tokens + TokensPerBlock - 1) / TokensPerBlock);
}
