namespace FlexLLM.Scheduling;

/// <summary>
/// How much of what a request has saved against its TPOT target finetuning leaves to it, because prompts and other requests that are not
/// there yet will want it. Learnt from two things: how unevenly requests alone use the time between two of their tokens, and whether
/// those that ended too late would have been in time without finetuning. Immutable: an observation makes a new one. The default
/// keeps nothing.
/// </summary>
internal readonly record struct SlackReserve
{
    // Steps that are looked at together: the chunks of one prompt come one after another.
    private const int StepsTogether = 8;

    // Groups that tell something.
    private const double GroupsMin = 16.0;

    private static readonly TimeSpan Memory = TimeSpan.FromSeconds(60);

    private const double CautionAtStart = 5.0;
    private const double CautionMin = 0.25;
    private const double CautionMax = 8.0;

    // Share of the answers that finetuning may make late.
    private const double LateShare = 0.01;

    // Where no answer was late yet, caution is more likely to be too high than too low.
    private const double Untried = 5.0;

    // What steps so far took beyond a target each, per group of steps: means that forget, over how many groups, in seconds.
    private double Groups { get; init; }

    private double Mean { get; init; }

    private double MeanSquare { get; init; }

    // The group that is not full yet.
    private int Steps { get; init; }

    private double Sum { get; init; }

    private TimeSpan GroupBegun { get; init; }

    /// <summary>How many standard deviations of the coming steps' time are kept.</summary>
    public double Caution { get; private init; }

    private bool WasLate { get; init; }

    /// <summary>Whether too few steps were seen of late to tell what bursts there are.</summary>
    public bool KnowsLittle => Groups < GroupsMin;

    /// <summary>What an engine begins with: nothing seen yet, and careful.</summary>
    public static SlackReserve Initial { get; } = new() { Caution = CautionAtStart };

    /// <summary>
    /// What a request leaves alone that can still generate so many tokens. Its steps are a walk with a drift, down while requests alone
    /// keep the target; r of them climb to about r * mean + caution * sqrt(r * variance), which is the most that this comes to on the way.
    /// </summary>
    public TimeSpan For(int tokensLeft)
    {
        double mean = Mean / StepsTogether;
        double variance = Math.Max(0.0, MeanSquare - (Mean * Mean)) / StepsTogether;
        double highest = mean < 0.0 ? Caution * Caution * variance / (4.0 * mean * mean) : double.PositiveInfinity;
        double steps = Math.Min(tokensLeft, highest);
        return TimeSpan.FromSeconds(Math.Max(0.0, (steps * mean) + (Caution * Math.Sqrt(steps * variance))));
    }

    /// <summary>A step in which somebody decoded took this much longer than the tightest target, finetuning left out.</summary>
    /// <param name="excess">Mostly negative: what such a step would save.</param>
    /// <param name="now">Time since the engine's start.</param>
    public SlackReserve Observe(TimeSpan excess, TimeSpan now)
    {
        SlackReserve longer = this with { Steps = Steps + 1, Sum = Sum + excess.TotalSeconds };
        if (longer.Steps < StepsTogether)
        {
            return longer;
        }

        double groups = (Groups * Math.Exp((GroupBegun - now) / Memory)) + 1.0;
        return this with
        {
            Groups = groups,
            Mean = Mean + ((longer.Sum - Mean) / groups),
            MeanSquare = MeanSquare + (((longer.Sum * longer.Sum) - MeanSquare) / groups),
            Steps = 0,
            Sum = 0.0,
            GroupBegun = now,
        };
    }

    /// <summary>An answer has ended.</summary>
    /// <param name="late">Its time beyond its TPOT target for all tokens; negative when it was in time.</param>
    /// <param name="finetuning">Time that finetuning took from its first token to its last.</param>
    public SlackReserve Ended(TimeSpan late, TimeSpan finetuning)
    {
        bool isFault = late > TimeSpan.Zero && late <= finetuning; // Else no caution would have helped.
        double change = isFault ? 1.0 - LateShare : -LateShare * (WasLate ? 1.0 : Untried);
        return this with
        {
            Caution = Math.Clamp(Caution * Math.Exp(change), CautionMin, CautionMax),
            WasLate = WasLate || isFault,
        };
    }
}
