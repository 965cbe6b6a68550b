using FlexLLM.Scheduling;

namespace FlexLLM.Tests.Scheduling;

/// <summary>What planners are asked about: a second after the start, blocks of 16 tokens, targets of 50 ms and 1 s.</summary>
internal static class Snapshots
{
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
