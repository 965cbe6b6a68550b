using System.Security.Cryptography;
using System.Text;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>What became of one request. Times in seconds since the start of its run; null where it never came so far.</summary>
internal sealed record RequestOutcome(
    double ArrivalTime, int PromptTokens, int AnswerTokens, double? FirstTokenTime, double? LastTokenTime, int TokensGenerated)
{
    /// <summary>Time from arrival to the first token, waiting included, in seconds.</summary>
    public double? Ttft => FirstTokenTime - ArrivalTime;

    /// <summary>Mean time between tokens in seconds; null for an answer of fewer than two tokens.</summary>
    public double? Tpot => TokensGenerated < 2 ? null : (LastTokenTime - FirstTokenTime) / (TokensGenerated - 1);

    /// <summary>Whether the whole answer came, within both targets (seconds).</summary>
    public bool Attains(double ttftTarget, double tpotTarget) =>
        TokensGenerated >= AnswerTokens && Ttft <= ttftTarget && (Tpot ?? 0.0) <= tpotTarget;
}

/// <summary>Tokens of one interval of a run.</summary>
/// <param name="Time">Start of the interval in seconds since the start of the run.</param>
/// <param name="PromptTokens">Prompt tokens computed.</param>
/// <param name="GeneratedTokens">Tokens generated.</param>
/// <param name="TrainedTokens">Finetuning tokens whose forward pass was done.</param>
internal readonly record struct ThroughputPoint(double Time, long PromptTokens, long GeneratedTokens, long TrainedTokens);

/// <summary>One sharing mode under one load, measured or simulated.</summary>
internal sealed record ServingRun
{
    /// <summary>Such as "co-serving" or "temporal-128".</summary>
    public required string Mode { get; init; }

    /// <summary>Name of the load, such as "light", or "12 req/s".</summary>
    public required string Load { get; init; }

    /// <summary>Mean arrivals a second.</summary>
    public required double RequestsPerSecond { get; init; }

    /// <summary>Length of the window in which tokens were counted, in seconds.</summary>
    public required double Seconds { get; init; }

    public required double TtftTarget { get; init; }

    public required double TpotTarget { get; init; }

    public required IReadOnlyList<RequestOutcome> Requests { get; init; }

    /// <summary>Tokens generated within the window.</summary>
    public required long TokensGenerated { get; init; }

    /// <summary>Finetuning tokens whose forward pass was done within the window, each counted once.</summary>
    public required long TokensTrained { get; init; }

    public required long Steps { get; init; }

    /// <summary>Steps with finetuning.</summary>
    public required long FinetuningSteps { get; init; }

    /// <summary>Those of them that took longer than their budget.</summary>
    public required long StepsOverBudget { get; init; }

    public required long Preemptions { get; init; }

    /// <summary>
    /// Time that engines spent in steps, of two engines in real time added up, of two simulated ones that of the one that serves; null
    /// where it was not measured.
    /// </summary>
    public double? BusySeconds { get; init; }

    public IReadOnlyList<ThroughputPoint> Series { get; init; } = [];

    /// <summary>Digest of the event log of a simulation; null for a measured run.</summary>
    public string? EventHash { get; init; }

    /// <summary>Share of the requests that were answered within both targets.</summary>
    public double Attainment => Requests.Count == 0 ? 1.0 : Requests.Count(r => r.Attains(TtftTarget, TpotTarget)) / (double)Requests.Count;

    /// <summary>Share of the steps with finetuning that took longer than their budget; null where there was none.</summary>
    public double? OverBudget => FinetuningSteps == 0 ? null : StepsOverBudget / (double)FinetuningSteps;

    public double GeneratedPerSecond => TokensGenerated / Seconds;

    public double TrainedPerSecond => TokensTrained / Seconds;

    /// <summary>
    /// This run of an engine that serves and that of an engine that trains, each with a clock of its own, as one: requests wait for
    /// their own engine alone.
    /// </summary>
    public ServingRun Beside(ServingRun training) => this with
    {
        TokensTrained = training.TokensTrained,
        Series = [.. Series.Zip(training.Series, (s, t) => s with { TrainedTokens = t.TrainedTokens })],
        EventHash = $"{EventHash}-{training.EventHash}",
    };

    /// <summary>All runs, those of one mode under one load joined; runs without requests first, then load by load.</summary>
    public static IReadOnlyList<ServingRun> JoinedInOrder(
        IEnumerable<ServingRun> runs, IReadOnlyList<ServingMode> modes, IReadOnlyList<(string Name, double Rate)> loads)
    {
        List<string> modeOrder = [.. modes.Select(mode => mode.Name)];
        List<string> loadOrder = [.. loads.Select(load => load.Name)];
        return
        [
            .. runs.GroupBy(r => (r.Load, r.Mode)).Select(g => Joined([.. g]))
                .OrderBy(r => loadOrder.IndexOf(r.Load)).ThenBy(r => modeOrder.IndexOf(r.Mode)),
        ];
    }

    /// <summary>Runs of one mode under one load as one long run: the times of each count from the end of the one before.</summary>
    public static ServingRun Joined(IReadOnlyList<ServingRun> runs)
    {
        var requests = new List<RequestOutcome>();
        var series = new List<ThroughputPoint>();
        double begin = 0;
        foreach (ServingRun run in runs)
        {
            double at = begin;
            requests.AddRange(run.Requests.Select(r => r with
            {
                ArrivalTime = at + r.ArrivalTime,
                FirstTokenTime = at + r.FirstTokenTime,
                LastTokenTime = at + r.LastTokenTime,
            }));
            series.AddRange(run.Series.Select(p => p with { Time = at + p.Time }));
            begin += run.Seconds;
        }

        return runs[0] with
        {
            Seconds = begin,
            Requests = requests,
            TokensGenerated = runs.Sum(r => r.TokensGenerated),
            TokensTrained = runs.Sum(r => r.TokensTrained),
            Steps = runs.Sum(r => r.Steps),
            FinetuningSteps = runs.Sum(r => r.FinetuningSteps),
            StepsOverBudget = runs.Sum(r => r.StepsOverBudget),
            Preemptions = runs.Sum(r => r.Preemptions),
            BusySeconds = runs[0].BusySeconds is null ? null : runs.Sum(r => r.BusySeconds),
            Series = series,
            EventHash = runs.Count == 1 || runs[0].EventHash is null
                ? runs[0].EventHash
                : Convert.ToHexString(SHA256.HashData(Encoding.ASCII.GetBytes(string.Join('-', runs.Select(r => r.EventHash)))))[..16],
        };
    }
}
