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

    private static readonly TimeSpan Memory = TimeSpan.FromSeconds(60);

    private const double CautionAtStart = 5.0;
    private const double CautionMin = 0.25;
    private const double CautionMax = 8.0;

    // Share of the answers that finetuning may make late: where somebody is always there, and where nobody is for a tenth of the time or
    // more. Finetuning then loses little by leaving time to requests, for it has the time when they are gone.
    private const double LateShareBusy = 0.01;
    private const double LateShareIdle = 0.0005;
    private const double IdleEnough = 0.1;

    // Where no answer was late yet, caution is more likely to be too high than too low.
    private const double Untried = 12.0;

    // What groups of steps took, in seconds: means that forget, over how many groups.
    private double Groups { get; init; }

    private double Mean { get; init; }

    private double MeanSquare { get; init; }

    // The group that is not full yet.
    private int Steps { get; init; }

    private double Sum { get; init; }

    private TimeSpan GroupEnded { get; init; }

    // Share of the time without requests, a mean that forgets.
    private double Idle { get; init; }

    private double LateShare => LateShareBusy + ((LateShareIdle - LateShareBusy) * Math.Min(1.0, Idle / IdleEnough));

    /// <summary>How many standard deviations of the coming steps' time are kept.</summary>
    public double Caution { get; private init; }

    private bool WasLate { get; init; }

    /// <summary>What an engine begins with: nothing seen yet, and careful.</summary>
    public static SlackReserve Initial { get; } = new() { Caution = CautionAtStart };

    /// <summary>
    /// What a request leaves alone that can still generate so many tokens. Its steps beyond its target are a walk with a drift, down while
    /// requests alone keep the target; r of them climb to about r * drift + caution * sqrt(r * variance), which is the most that this
    /// comes to on the way. Nothing before a group of steps was seen.
    /// </summary>
    public TimeSpan For(int tokensLeft, TimeSpan target)
    {
        double drift = (Mean / StepsTogether) - target.TotalSeconds;
        double variance = Math.Max(0.0, MeanSquare - (Mean * Mean)) / StepsTogether;
        double stepsToPeak = drift < 0.0 ? Caution * Caution * variance / (4.0 * drift * drift) : double.PositiveInfinity;
        double steps = Math.Min(tokensLeft, stepsToPeak);
        return TimeSpan.FromSeconds(Math.Max(0.0, (steps * drift) + (Caution * Math.Sqrt(steps * variance))));
    }

    /// <summary>A step in which somebody decoded took so long, finetuning left out.</summary>
    /// <param name="took">Time of requests alone.</param>
    /// <param name="now">Time since the engine's start.</param>
    public SlackReserve Observe(TimeSpan took, TimeSpan now)
    {
        SlackReserve longer = this with { Steps = Steps + 1, Sum = Sum + took.TotalSeconds };
        if (longer.Steps < StepsTogether)
        {
            return longer;
        }

        double groups = (Groups * Math.Exp(Math.Min(0.0, (GroupEnded - now) / Memory))) + 1.0;
        return this with
        {
            Groups = groups,
            Mean = Mean + ((longer.Sum - Mean) / groups),
            MeanSquare = MeanSquare + (((longer.Sum * longer.Sum) - MeanSquare) / groups),
            Steps = 0,
            Sum = 0.0,
            GroupEnded = now,
        };
    }

    /// <summary>So much time has passed, in which requests were there or not.</summary>
    public SlackReserve Passed(TimeSpan time, bool isIdle) =>
        this with { Idle = Idle + (((isIdle ? 1.0 : 0.0) - Idle) * (1.0 - Math.Exp(-time / Memory))) };

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
