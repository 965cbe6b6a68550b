using System.Diagnostics;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>What an engine without finetuning can do on this machine; loads and targets are derived from it.</summary>
/// <param name="Tpot">Time per output token in seconds of a request that is alone.</param>
/// <param name="Ttft">Time to the first token in seconds of a request that is alone, for a prompt of mean length.</param>
/// <param name="GeneratedPerSecond">Tokens a second of an engine that never runs out of requests.</param>
/// <param name="RequestsPerSecond">The same in requests of mean length.</param>
internal sealed record LiveCapacity(double Tpot, double Ttft, double GeneratedPerSecond, double RequestsPerSecond)
{
    private const int Repetitions = 3;
    private const int AnswerTokens = 24;
    private const double TpotFactor = 3;
    private const double TtftFactor = 10;

    /// <summary>The given targets, or multiples of the least that is possible: 3 times its TPOT, 10 times its TTFT.</summary>
    public ServiceLevelObjective Targets(ServeSettings settings) => new()
    {
        TimePerOutputToken = TimeSpan.FromSeconds(settings.TpotTarget ?? RoundUp(TpotFactor * Tpot)),
        TimeToFirstToken = TimeSpan.FromSeconds(settings.TtftTarget ?? RoundUp(TtftFactor * Ttft)),
    };

    /// <summary>The capacity, and what follows from it, for reports.</summary>
    public IEnumerable<(string Name, string Value)> Describe(
        ServiceLevelObjective slo, IReadOnlyList<(string Name, double Rate)> loads) =>
    [
        (
            "targets",
            $"TPOT {slo.TimePerOutputToken.TotalMilliseconds.Fixed(1)} ms, TTFT {slo.TimeToFirstToken.TotalMilliseconds.Fixed(0)} ms"),
        ("capacity", $"{GeneratedPerSecond.Fixed(1)} generated tokens/s, {RequestsPerSecond.Fixed(2)} requests/s"),
        ("loads", string.Join(", ", loads.Select(l =>
            $"{l.Name} {l.Rate.Fixed(2)} requests/s ({(100 * l.Rate / RequestsPerSecond).Fixed(0)} % of capacity)"))),
    ];

    /// <summary>A trace whose lengths stand for those of any load.</summary>
    public static ArrivalTrace LengthsOf(ArrivalTrace trace, ServeSettings settings) =>
        trace.Scaled(1, 600, settings.Seed, settings.StartSecond, settings.Lengths);

    /// <summary>A request of the mean prompt, to be answered alone.</summary>
    public static TraceArrival Typical(ArrivalTrace trace, ServeSettings settings) => new(
        0, Math.Max(1, (int)trace.MeanPromptTokens), Math.Max(2, Math.Min(AnswerTokens, settings.Lengths.MaxAnswer)));

    /// <summary>Measures an engine with the lengths of a trace.</summary>
    /// <param name="engine">An engine that does nothing else.</param>
    /// <param name="trace">Lengths of requests; their times do not matter.</param>
    /// <param name="settings">Number of sequences, seed.</param>
    /// <param name="seconds">How long to saturate it; the first third is not counted.</param>
    public static async Task<LiveCapacity> MeasureAsync(
        CoServingEngine engine, ArrivalTrace trace, ServeSettings settings, double seconds)
    {
        var replay = new TraceReplay(engine, settings.Seed);
        var tpots = new List<double>();
        var ttfts = new List<double>();
        TraceArrival arrival = Typical(trace, settings);
        for (int i = 0; i <= Repetitions; i++)
        {
            RequestOutcome outcome = await replay.SendAsync(arrival, Stopwatch.GetTimestamp(), default).ConfigureAwait(false);

            // The first one pays for what is compiled and allocated once.
            if (i > 0)
            {
                tpots.Add(outcome.Tpot!.Value);
                ttfts.Add(outcome.Ttft!.Value);
            }
        }

        double generated = await SaturateAsync(engine, replay, trace, settings.Sequences, seconds).ConfigureAwait(false);
        return new LiveCapacity(
            LatencySummary.Percentile([.. tpots.Order()], 0.5), LatencySummary.Percentile([.. ttfts.Order()], 0.5), generated,
            generated / trace.MeanAnswerTokens);
    }

    /// <summary>Up to the next value of two digits.</summary>
    public static double RoundUp(double value)
    {
        double unit = Math.Pow(10, Math.Floor(Math.Log10(value)) - 1);
        return Math.Ceiling((value / unit) - 1e-9) * unit;
    }

    private static async Task<double> SaturateAsync(
        CoServingEngine engine, TraceReplay replay, ArrivalTrace trace, int sequences, double seconds)
    {
        using var stop = new CancellationTokenSource();
        long begin = Stopwatch.GetTimestamp();
        int next = -1;
        Task[] callers = [.. Enumerable.Range(0, sequences).Select(_ => Task.Run(CallAsync))];
        await Task.Delay(TimeSpan.FromSeconds(seconds / 3)).ConfigureAwait(false);
        long before = (await engine.GetStatisticsAsync().ConfigureAwait(false)).TokensGenerated;
        double from = Stopwatch.GetElapsedTime(begin).TotalSeconds;
        await Task.Delay(TimeSpan.FromSeconds(seconds * 2 / 3)).ConfigureAwait(false);
        long after = (await engine.GetStatisticsAsync().ConfigureAwait(false)).TokensGenerated;
        double to = Stopwatch.GetElapsedTime(begin).TotalSeconds;
        await stop.CancelAsync().ConfigureAwait(false);
        await Task.WhenAll(callers).ConfigureAwait(false);
        return Math.Max(1, after - before) / (to - from);

        async Task CallAsync()
        {
            while (!stop.IsCancellationRequested)
            {
                int index = Interlocked.Increment(ref next) % trace.Arrivals.Count;
                await replay.SendAsync(trace.Arrivals[index], begin, stop.Token).ConfigureAwait(false);
            }
        }
    }
}
