using FlexLLM.Scheduling;

namespace FlexLLM.Tests.Scheduling;

/// <summary>What planners are asked about: a second after the start, blocks of 16 tokens, targets of 50 ms and 1 s.</summary>
internal static class Snapshots
{
    /// <summary>10 ms a step, 0.1 ms a row or a finetuning token, 0.02 ms a backward row of a layer, nothing for context.</summary>
    public static readonly LatencyModel Latency = new(
        LatencyCoefficients.Linear(10e-3, 1e-4, 0.0, 0.0, 1e-4, 0.0, 0.0, 2e-5, 0.0), Correction: 1.0, Tail: 1.0);

    public static EngineSnapshot Of(SequenceSnapshot[] sequences, int totalBlocks = 500) => new()
    {
        Now = Ms(1_000),
        Sequences = [.. sequences],
        FreeBlocks = totalBlocks - sequences.Where(s => s.Phase == SequencePhase.Running).Sum(s => s.BlocksHeld),
        TotalBlocks = totalBlocks,
        TokensPerBlock = 16,
    };

    /// <summary>Generated its first token right now.</summary>
    public static SequenceSnapshot Decoding(long id, int context) => new()
    {
        Id = new SequenceId(id),
        Phase = SequencePhase.Running,
        TokensTotal = context + 1,
        TokensComputed = context,
        TokensMax = context + 10,
        BlocksHeld = (context + 15) / 16,
        ArrivalTime = Ms(id),
        FirstTokenTime = Ms(1_000),
        TokensGenerated = 1,
        TpotTarget = Ms(50),
        TtftTarget = Ms(1_000),
    };

    /// <summary>Waits since now.</summary>
    public static SequenceSnapshot Prompt(long id, int tokens) => new()
    {
        Id = new SequenceId(id),
        Phase = SequencePhase.Waiting,
        TokensTotal = tokens,
        TokensMax = tokens + 100,
        ServiceDue = tokens,
        ArrivalTime = Ms(1_000),
        TpotTarget = Ms(50),
        TtftTarget = Ms(1_000),
    };

    public static TimeSpan Ms(double milliseconds) => TimeSpan.FromMilliseconds(milliseconds);
}
