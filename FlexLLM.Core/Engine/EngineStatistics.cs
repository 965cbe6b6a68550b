namespace FlexLLM;

/// <summary>What an engine has done and holds at one moment.</summary>
public sealed record EngineStatistics
{
    /// <summary>Steps done.</summary>
    public required long Steps { get; init; }

    /// <summary>Time spent in steps; the rest the engine waited for work.</summary>
    public required TimeSpan TimeInSteps { get; init; }

    /// <summary>Steps in which finetuning had a part.</summary>
    public required long FinetuningSteps { get; init; }

    /// <summary>Of <see cref="FinetuningSteps"/>, those that took longer than the budget that the requests left.</summary>
    public required long StepsOverBudget { get; init; }

    /// <summary>Requests taken in.</summary>
    public required long Requests { get; init; }

    /// <summary>Requests that ended, cancelled ones not counted.</summary>
    public required long RequestsFinished { get; init; }

    /// <summary>Requests that ended within all of their latency targets.</summary>
    public required long RequestsAttained { get; init; }

    /// <summary>Requests in the engine now.</summary>
    public required int RequestsActive { get; init; }

    /// <summary>Requests that lost their KV blocks to others; what nobody kept of them was computed again.</summary>
    public required long Preemptions { get; init; }

    /// <summary>
    /// Tokens whose keys and values were in the cache when their request got a place: of prompts that begin like earlier ones, and
    /// of requests that had lost their blocks.
    /// </summary>
    public required long TokensReused { get; init; }

    /// <summary>Tokens generated.</summary>
    public required long TokensGenerated { get; init; }

    /// <summary>Finetuning tokens whose forward pass is done.</summary>
    public required long TokensTrained { get; init; }

    /// <summary>Mean time to first token, waiting included.</summary>
    public required TimeSpan MeanTimeToFirstToken { get; init; }

    /// <summary>Mean time between the tokens of an answer.</summary>
    public required TimeSpan MeanTimePerOutputToken { get; init; }

    /// <summary>KV blocks that requests hold.</summary>
    public required int KvBlocksHeld { get; init; }

    /// <summary>KV blocks there are now; finetuning may have taken some.</summary>
    public required int KvBlocksTotal { get; init; }

    /// <summary>KV blocks when finetuning has taken none.</summary>
    public required int KvBlocksMax { get; init; }

    /// <summary>Bytes on the device: weights, caches, activations, adapters, jobs.</summary>
    public required long DeviceBytes { get; init; }

    /// <summary>Most bytes on the device.</summary>
    public required long DeviceBytesMax { get; init; }

    /// <summary>Part of <see cref="DeviceBytes"/> that finetuning jobs hold, versions that they published not counted.</summary>
    public required long JobBytes { get; init; }
}
