using FlexLLM.Backends;

namespace FlexLLM.Execution;

/// <summary>
/// What a checkpoint's generation_config.json says about sampling; the initial values are those of no such file.
/// </summary>
internal readonly record struct SamplingDefaults()
{
    /// <summary>0 where do_sample is false.</summary>
    public float Temperature { get; init; }

    public int TopK { get; init; }

    public float TopP { get; init; } = 1f;

    public float MinP { get; init; }

    public float RepetitionPenalty { get; init; } = 1f;
}

/// <summary><see cref="SamplingOptions"/> with every default filled in; never changes during a request.</summary>
internal sealed record SamplingParameters
{
    public float Temperature { get; init; }

    public int TopK { get; init; }

    public float TopP { get; init; } = 1f;

    public float MinP { get; init; }

    public float RepetitionPenalty { get; init; } = 1f;

    public float PresencePenalty { get; init; }

    public float FrequencyPenalty { get; init; }

    public KeyValuePair<int, float>[] LogitBias { get; init; } = [];

    public ulong Seed { get; init; }

    public int? LogProbs { get; init; }

    /// <summary>Below this a division would only magnify rounding: the most probable token is taken.</summary>
    public bool IsGreedy => Temperature < 1e-5f;

    /// <summary>Whether the token is that of the largest logit, and nothing else of them is wanted.</summary>
    public bool IsArgMax => IsGreedy && LogitBias.Length == 0 && !CountsTokens && LogProbs is null;

    /// <summary>
    /// How many of the largest logits the choice is among, where no others count and they are few enough to be asked of the device; else
    /// null.
    /// </summary>
    public int? Candidates =>
        !IsGreedy && TopK is > 0 and < ScratchLimits.LargestMax && LogitBias.Length == 0 && !CountsTokens && LogProbs is null ? TopK : null;

    /// <summary>Whether the choice depends on which tokens came before, so that they must be counted.</summary>
    public bool CountsTokens => RepetitionPenalty != 1f || PresencePenalty != 0f || FrequencyPenalty != 0f;
}
