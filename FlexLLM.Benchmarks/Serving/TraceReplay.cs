using System.Diagnostics;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>
/// Sends the requests of a trace to an engine when they are due, with random prompts, and notes when each token is received.
/// </summary>
internal sealed class TraceReplay(CoServingEngine engine, ulong seed)
{
    private readonly Lock _gate = new();
    private SeededRandom _random = new(seed);
    private long _promptTokens;
    private long _generatedTokens;
    private int _sent;
    private int _answered;

    /// <summary>Prompt tokens computed so far; those of a request count when its first token is there.</summary>
    public long PromptTokens => Interlocked.Read(ref _promptTokens);

    /// <summary>Tokens received so far.</summary>
    public long GeneratedTokens => Interlocked.Read(ref _generatedTokens);

    /// <summary>Requests sent so far.</summary>
    public int Sent => Volatile.Read(ref _sent);

    /// <summary>Requests whose answers are whole.</summary>
    public int Answered => Volatile.Read(ref _answered);

    /// <summary>Runs a trace to the end of its last answer.</summary>
    /// <param name="trace">Arrivals; their times count from <paramref name="begin"/>.</param>
    /// <param name="begin">A timestamp of <see cref="Stopwatch"/>.</param>
    /// <param name="stop">Ends what is still unanswered; those requests have the tokens that had come.</param>
    public async Task<IReadOnlyList<RequestOutcome>> RunAsync(ArrivalTrace trace, long begin, CancellationToken stop)
    {
        var requests = new List<Task<RequestOutcome>>(trace.Arrivals.Count);
        foreach (TraceArrival arrival in trace.Arrivals)
        {
            while (arrival.Time - Stopwatch.GetElapsedTime(begin).TotalSeconds is double wait and > 0)
            {
                await Task.Delay(TimeSpan.FromSeconds(wait), CancellationToken.None).ConfigureAwait(false);
            }

            requests.Add(SendAsync(arrival, begin, stop));
        }

        return await Task.WhenAll(requests).ConfigureAwait(false);
    }

    /// <summary>Sends one request now and reads its answer.</summary>
    /// <param name="arrival">When it was due, from <paramref name="begin"/>: a late start is part of its waiting.</param>
    /// <param name="begin">A timestamp of <see cref="Stopwatch"/>.</param>
    /// <param name="stop">Ends the answer early.</param>
    public async Task<RequestOutcome> SendAsync(TraceArrival arrival, long begin, CancellationToken stop)
    {
        var request = new GenerationRequest(NextPrompt(arrival.PromptTokens)) { MaxTokens = arrival.AnswerTokens, IgnoreEos = true };
        double? first = null;
        double? last = null;
        int tokens = 0;
        Interlocked.Increment(ref _sent);
        try
        {
            await foreach (GeneratedToken token in engine.GenerateAsync(request, stop).ConfigureAwait(false))
            {
                if (token.TokenId < 0)
                {
                    continue;
                }

                last = Stopwatch.GetElapsedTime(begin).TotalSeconds;
                Interlocked.Increment(ref _generatedTokens);
                if (++tokens == 1)
                {
                    first = last;
                    Interlocked.Add(ref _promptTokens, arrival.PromptTokens);
                }
            }

            Interlocked.Increment(ref _answered);
        }
        catch (OperationCanceledException) when (stop.IsCancellationRequested)
        {
            // Unanswered in time: the outcome says how far it came.
        }

        return new RequestOutcome(arrival.Time, arrival.PromptTokens, arrival.AnswerTokens, first, last, tokens);
    }

    // Requests may be sent from several threads at a time.
    private int[] NextPrompt(int count)
    {
        lock (_gate)
        {
            return FinetuningData.RandomIds(ref _random, engine.Config.VocabularySize, count);
        }
    }
}
