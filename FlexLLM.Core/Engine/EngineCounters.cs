using System.Diagnostics.Metrics;

namespace FlexLLM.Engine;

/// <summary>Counters of one loop. Written by the loop thread; others read single values, each of which is whole.</summary>
internal sealed class EngineCounters
{
    // An inter-token target is one of the 99th percentile.
    private const double LateShareMax = 0.01;

    private static readonly Meter Meter = new("FlexLLM");
    private static readonly Histogram<double> TimeToFirstToken =
        Meter.CreateHistogram<double>("gen_ai.server.time_to_first_token", "s");
    private static readonly Histogram<double> TimePerOutputToken =
        Meter.CreateHistogram<double>("gen_ai.server.time_per_output_token", "s");
    private static readonly Histogram<double> RequestDuration =
        Meter.CreateHistogram<double>("gen_ai.server.request.duration", "s");

    private long _attained;
    private long _finished;
    private double _tpotSeconds;
    private double _ttftSeconds;
    private long _firstTokens;
    private long _laterTokens;

    public long Steps { get; set; }

    public TimeSpan TimeInSteps { get; set; }

    /// <summary>Steps with finetuning.</summary>
    public long FinetuningSteps { get; set; }

    /// <summary>Those of them that took longer than their budget.</summary>
    public long StepsOverBudget { get; set; }

    /// <summary>Steps of finetuning alone that a request ended before they had done anything.</summary>
    public long StepsGivenUp { get; set; }

    public long Requests { get; set; }

    public long Preemptions { get; set; }

    /// <summary>Tokens of admitted requests whose keys and values were in the cache.</summary>
    public long TokensReused { get; set; }

    public long GeneratedTokens { get; private set; }

    public long Finished => _finished;

    /// <summary>Requests that ended within all of their latency targets.</summary>
    public long Attained => _attained;

    /// <summary>Mean TTFT in seconds.</summary>
    public double MeanTtft => _firstTokens == 0 ? 0 : _ttftSeconds / _firstTokens;

    /// <summary>Mean time in seconds between tokens, over all tokens but first ones.</summary>
    public double MeanTpot => _laterTokens == 0 ? 0 : _tpotSeconds / _laterTokens;

    /// <summary>A token of this sequence is about to be delivered.</summary>
    public void Observe(InferenceSequence sequence, TimeSpan now)
    {
        GeneratedTokens++;
        if (sequence.LastTokenTime is TimeSpan last)
        {
            _laterTokens++;
            _tpotSeconds += (now - last).TotalSeconds;
            sequence.TokensLate += now - last > sequence.Slo.InterTokenLatency ? 1 : 0;
            return;
        }

        double ttft = (now - sequence.ArrivalTime).TotalSeconds;
        _firstTokens++;
        _ttftSeconds += ttft;
        Record(TimeToFirstToken, ttft);
    }

    /// <summary>The sequence has ended.</summary>
    public void Finish(InferenceSequence sequence, FinishReason reason, TimeSpan now)
    {
        _finished++;
        Record(RequestDuration, (now - sequence.ArrivalTime).TotalSeconds);
        if (reason == FinishReason.Error || sequence.FirstTokenTime is not TimeSpan first)
        {
            return;
        }

        double tpot = sequence.Generated > 1 ? (now - first).TotalSeconds / (sequence.Generated - 1) : 0;
        if (sequence.Generated > 1)
        {
            Record(TimePerOutputToken, tpot);
        }

        bool isMet = first - sequence.ArrivalTime <= sequence.Slo.TimeToFirstToken &&
            tpot <= sequence.Slo.TimePerOutputToken.TotalSeconds &&
            sequence.TokensLate <= LateShareMax * (sequence.Generated - 1);
        _attained += isMet ? 1 : 0;
    }

    // Listeners are the host's code on the engine's thread: what they throw must not stop the engine.
    private static void Record(Histogram<double> histogram, double seconds)
    {
        try
        {
            histogram.Record(seconds);
        }
#pragma warning disable CA1031 // Any exception at all is the listener's.
        catch
#pragma warning restore CA1031
        {
            // The value is lost to that listener alone.
        }
    }
}
