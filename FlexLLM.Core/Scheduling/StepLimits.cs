namespace FlexLLM.Scheduling;

/// <summary>Bounds of one step. Rows are tokens of one step; times are of one step unless they say otherwise.</summary>
internal sealed record StepLimits
{
    /// <summary>How finetuning shares the steps with inference.</summary>
    public SharingPolicy Sharing { get; init; } = SharingPolicy.CoServing;

    /// <summary>Most rows of one batch: inference and forward finetuning together.</summary>
    public int TokensPerStepMax { get; init; } = 512;

    /// <summary>Most sequences that run at a time; at most TokensPerStepMax, so that each can decode.</summary>
    public int SequencesMax { get; init; } = 64;

    /// <summary>Prompt tokens that a step computes even when decoding leaves no time for them.</summary>
    public int PrefillChunkMin { get; init; } = 16;

    /// <summary>Most prompt tokens of one sequence in one step.</summary>
    public int PrefillChunkMax { get; init; } = int.MaxValue;

    /// <summary>Most rows of one backward item.</summary>
    public int BackwardRowsMax { get; init; } = 512;

    /// <summary>
    /// Longest backward item, so that the executor could stop soon. Where reading a layer's weights takes more than half of it, an item
    /// may take twice as long as they do: cut further, it would be mostly that read. One row may always take longer.
    /// </summary>
    public TimeSpan BackwardItemTimeMax { get; init; } = TimeSpan.FromMilliseconds(20);

    /// <summary>What a new arrival may have to wait for finetuning that no deadline bounds: the longest such part of a step.</summary>
    public TimeSpan IdleStepMax { get; init; } = TimeSpan.FromMilliseconds(100);

    /// <summary>
    /// Whether an idle step is given up for a request that comes while less of its forward windows is done than is left. It may then take
    /// twice <see cref="IdleStepMax"/>: nobody waits for more than half of it.
    /// </summary>
    public bool GivesUpWindows { get; init; }

    /// <summary>Longest finetuning in a step while no request is there.</summary>
    public TimeSpan IdleFinetuningMax => GivesUpWindows ? IdleStepMax * 2.0 : IdleStepMax;

    /// <summary>
    /// Most slack that one step may spend, in TPOT targets of the tightest request. Longer steps save little more of what a step costs by
    /// itself, and whoever arrives in the middle of one waits for its end.
    /// </summary>
    public double SlackTargetsMax { get; init; } = 2.0;

    /// <summary>
    /// Mean time per token that is planned for, in TPOT targets. The last step of an answer may take longer than predicted, with no
    /// later one to make up for it, and its caller's clock also sees the token delivered. More than 0.
    /// </summary>
    public double TpotPlanned { get; init; } = 0.998;

    /// <summary>
    /// Least chunks of a prompt that may come, whose time beyond the TPOT target finetuning leaves to the requests that decode, whatever
    /// was seen so far: it could spend all they have saved, and the chunks would then be late.
    /// </summary>
    public int ChunksAhead { get; init; } = 8;

    /// <summary>Whether finetuning leaves to requests what <see cref="EngineSnapshot.Reserve"/> says.</summary>
    public bool KeepsReserve { get; init; } = true;

    /// <summary>Share of what a prompt could spare before its TTFT deadline that is not spent; 0 to 1.</summary>
    public double PromptHeldBack { get; init; } = 0.05;

    /// <summary>
    /// Most that a window or the items of a sample may cost by themselves, as a share of all they add to a step; else they wait for
    /// a larger budget where it grows. 0 to 1.
    /// </summary>
    public double FixedShareMax { get; init; } = 0.2;

    /// <summary>Most steps without finetuning for the sake of that.</summary>
    public int ThriftStepsMax { get; init; } = 8;

    /// <summary>
    /// Share of the KV blocks below whose being free finetuning gets less: long steps keep requests in the cache for longer, until new
    /// ones find no room. 0 to 1; 0 for no such limit.
    /// </summary>
    public double FreeBlocksShare { get; init; } = 0.2;

    /// <summary>
    /// Share of the KV blocks at which it gets nothing beside requests; at most <see cref="FreeBlocksShare"/>. Not much below it, as time
    /// that is given up while there is room is lost, and a queue that has begun lasts.
    /// </summary>
    public double FreeBlocksMin { get; init; } = 0.15;

    /// <summary>Admission leaves room for every running sequence to grow by this many tokens.</summary>
    public int GrowthHorizon { get; init; } = 64;

    /// <summary>Most waiting sequences that do not fit and may be passed by smaller ones behind them.</summary>
    public int SkipAheadMax { get; init; } = 8;

    /// <summary>A sequence that has waited this long since its arrival is passed by no other.</summary>
    public TimeSpan SkipAheadWaitMax { get; init; } = TimeSpan.FromSeconds(2);

    /// <summary>Waiting that equals one level of priority: the lowest priority starves nobody and is not starved.</summary>
    public TimeSpan AgeingPerPriority { get; init; } = TimeSpan.FromSeconds(10);

    /// <summary>
    /// A waiting sequence goes before those that came up to this much earlier, for its share of tokens that are in the cache: what it
    /// needs is gone once others have taken the room. A bounded credit starves nobody.
    /// </summary>
    public TimeSpan PrefixCreditMax { get; init; } = TimeSpan.FromSeconds(1);

    /// <summary>A tenant with waiting sequences that got no place for this long goes first once, whatever it had before.</summary>
    public TimeSpan TenantWaitMax { get; init; } = TimeSpan.FromSeconds(30);

    /// <summary>Checks every bound.</summary>
    /// <exception cref="ArgumentOutOfRangeException">A bound is out of its range.</exception>
    public void Validate()
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(TokensPerStepMax, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(SequencesMax, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(SequencesMax, TokensPerStepMax);
        ArgumentOutOfRangeException.ThrowIfLessThan(PrefillChunkMin, 1);
        ArgumentOutOfRangeException.ThrowIfLessThan(PrefillChunkMax, PrefillChunkMin);
        ArgumentOutOfRangeException.ThrowIfLessThan(BackwardRowsMax, 1);
        ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(BackwardItemTimeMax, TimeSpan.Zero);
        ArgumentOutOfRangeException.ThrowIfLessThan(IdleStepMax, TimeSpan.Zero);
        ArgumentOutOfRangeException.ThrowIfNegative(SlackTargetsMax);
        ArgumentOutOfRangeException.ThrowIfNegative(PromptHeldBack);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(PromptHeldBack, 1.0);
        ArgumentOutOfRangeException.ThrowIfNegative(ChunksAhead);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(TpotPlanned);
        ArgumentOutOfRangeException.ThrowIfNegative(FreeBlocksMin);
        ArgumentOutOfRangeException.ThrowIfLessThan(FreeBlocksShare, FreeBlocksMin);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(FreeBlocksShare, 1.0);
        ArgumentOutOfRangeException.ThrowIfNegative(FixedShareMax);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(FixedShareMax, 1.0);
        ArgumentOutOfRangeException.ThrowIfNegative(ThriftStepsMax);
        ArgumentOutOfRangeException.ThrowIfNegative(GrowthHorizon);
        ArgumentOutOfRangeException.ThrowIfNegative(SkipAheadMax);
        ArgumentOutOfRangeException.ThrowIfLessThan(SkipAheadWaitMax, TimeSpan.Zero);
        ArgumentOutOfRangeException.ThrowIfLessThan(AgeingPerPriority, TimeSpan.Zero);
        ArgumentOutOfRangeException.ThrowIfLessThan(PrefixCreditMax, TimeSpan.Zero);
        ArgumentOutOfRangeException.ThrowIfLessThan(TenantWaitMax, TimeSpan.Zero);
    }
}
