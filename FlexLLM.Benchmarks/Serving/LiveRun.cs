using System.Diagnostics;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>Measures one mode under one load on engines that run in real time.</summary>
internal static class LiveRun
{
    private static readonly TimeSpan SampleInterval = TimeSpan.FromMilliseconds(250);
    private static readonly TimeSpan ReportInterval = TimeSpan.FromSeconds(5);

    /// <summary>
    /// Warms up, replays the trace, and waits for the answers. Tokens, steps and preemptions are those of the window; the requests
    /// are all that arrive in it.
    /// </summary>
    /// <param name="server">Engines of the mode.</param>
    /// <param name="settings">Window and seeds.</param>
    /// <param name="trace">Arrivals, or null where nothing arrives.</param>
    /// <param name="slo">Targets that the outcomes are held against.</param>
    /// <param name="names">Mode and load.</param>
    /// <param name="progress">Takes a line now and then.</param>
    public static async Task<ServingRun> MeasureAsync(
        LiveServer server, ServeSettings settings, ArrivalTrace? trace, ServiceLevelObjective slo, (string Mode, string Load) names,
        Action<string> progress)
    {
        await server.WarmUpAsync(settings).ConfigureAwait(false);
        TraceReplay? replay = trace is null ? null : new TraceReplay(server.Serving!, settings.Seed);
        using var stop = new CancellationTokenSource();
        LiveCounters begun = await server.ReadAsync().ConfigureAwait(false);
        long begin = Stopwatch.GetTimestamp();
        Task<IReadOnlyList<RequestOutcome>> requests = replay is null
            ? Task.FromResult<IReadOnlyList<RequestOutcome>>([])
            : Task.Run(() => replay.RunAsync(trace!, begin, stop.Token));
        (List<ThroughputPoint> series, LiveCounters done, double seconds) =
            await SampleAsync(server, settings.Seconds, replay, requests, begun, begin, progress).ConfigureAwait(false);
        stop.CancelAfter(TimeSpan.FromSeconds(settings.DrainSeconds));
        LiveCounters window = done - begun;
        return new ServingRun
        {
            Mode = names.Mode,
            Load = names.Load,
            RequestsPerSecond = trace?.Rate ?? 0,
            Seconds = seconds,
            TtftTarget = slo.TimeToFirstToken.TotalSeconds,
            TpotTarget = slo.TimePerOutputToken.TotalSeconds,
            Requests = await requests.ConfigureAwait(false),
            TokensGenerated = series.Sum(p => p.GeneratedTokens),
            TokensTrained = window.Trained,
            Steps = window.Steps,
            FinetuningSteps = window.FinetuningSteps,
            StepsOverBudget = window.StepsOverBudget,
            Preemptions = window.Preemptions,
            BusySeconds = window.BusySeconds,
            Series = series,
        };
    }

    // The engine tells its counters between two steps, so intervals are as long as they turn out to be.
    private static async Task<(List<ThroughputPoint> Series, LiveCounters Done, double Seconds)> SampleAsync(
        LiveServer server, double seconds, TraceReplay? replay, Task requests, LiveCounters begun, long begin, Action<string> progress)
    {
        var series = new List<ThroughputPoint>();
        LiveCounters before = begun;
        double timeBefore = 0;
        double reported = 0;
        (long Prompts, long Generated) servedBefore = (0, 0);
        while (timeBefore < seconds)
        {
            double left = Math.Max(0.001, seconds - Stopwatch.GetElapsedTime(begin).TotalSeconds);
            await Task.Delay(TimeSpan.FromSeconds(Math.Min(left, SampleInterval.TotalSeconds))).ConfigureAwait(false);
            if (requests.IsFaulted)
            {
                await requests.ConfigureAwait(false);
            }

            LiveCounters now = await server.ReadAsync().ConfigureAwait(false);
            double time = Stopwatch.GetElapsedTime(begin).TotalSeconds;
            (long Prompts, long Generated) served = (replay?.PromptTokens ?? 0, replay?.GeneratedTokens ?? 0);
            series.Add(new ThroughputPoint(
                timeBefore, served.Prompts - servedBefore.Prompts, served.Generated - servedBefore.Generated,
                (now - before).Trained));
            (before, timeBefore, servedBefore) = (now, time, served);
            if (time - reported >= ReportInterval.TotalSeconds)
            {
                reported = time;
                progress(
                    $"{time.Fixed(0)} of {seconds.Fixed(0)} s, {replay?.Answered ?? 0} of {replay?.Sent ?? 0} requests answered, " +
                    $"{(served.Generated / time).Fixed(1)} generated/s, {((now - begun).Trained / time).Fixed(1)} trained/s");
            }
        }

        return (series, before, timeBefore);
    }
}
