using FlexLLM.Execution;

namespace FlexLLM;

/// <summary>
/// How the next token is chosen from the model's logits. A property left null takes the checkpoint's default (its
/// generation_config.json). Applied in this order: logit bias, penalties, temperature, top-k, top-p, min-p, draw.
/// </summary>
public sealed record SamplingOptions
{
    /// <summary>Most alternatives that <see cref="LogProbs"/> may ask for.</summary>
    public const int LogProbsMax = 20;

    /// <summary>Always the most probable token.</summary>
    public static SamplingOptions Greedy { get; } = new() { Temperature = 0f };

    /// <summary>Divides the logits; 0 or more. 0 always takes the most probable token (the lowest id among equals).</summary>
    public float? Temperature { get; init; }

    /// <summary>Keeps only this many of the most probable tokens; 0 keeps all.</summary>
    public int? TopK { get; init; }

    /// <summary>Keeps the fewest most probable tokens that together have this probability; 0 to 1, 1 keeps all.</summary>
    public float? TopP { get; init; }

    /// <summary>Drops tokens less probable than this share of the most probable one; 0 to 1, 0 keeps all.</summary>
    public float? MinP { get; init; }

    /// <summary>
    /// Makes every token of the prompt and the answer less likely to return: positive logits are divided by it, negative
    /// ones multiplied. More than 0; 1 changes nothing.
    /// </summary>
    public float? RepetitionPenalty { get; init; }

    /// <summary>Subtracted from the logit of each token generated so far; -2 to 2, 0 changes nothing.</summary>
    public float PresencePenalty { get; init; }

    /// <summary>Subtracted from a token's logit once for each time it was generated so far; -2 to 2, 0 changes nothing.</summary>
    public float FrequencyPenalty { get; init; }

    /// <summary>Added to the logits of these token ids; negative infinity forbids a token. Null changes nothing.</summary>
    public IReadOnlyDictionary<int, float>? LogitBias { get; init; }

    /// <summary>
    /// Seed of the request's own random numbers: the same seed gives the same answer. Null lets the engine choose one.
    /// </summary>
    public ulong? Seed { get; init; }

    /// <summary>
    /// Reports the natural logarithm of the chosen token's probability and of this many most probable alternatives (0 to
    /// <see cref="LogProbsMax"/>), before bias, penalties and temperature. Null reports nothing.
    /// </summary>
    public int? LogProbs { get; init; }

    /// <summary>Checks every property.</summary>
    /// <exception cref="ArgumentException">A value is out of its range; the message names the property.</exception>
    public void Validate()
    {
        Require(Temperature is null or (>= 0f and < float.PositiveInfinity), nameof(Temperature), "0 or more");
        Require(TopK is null or >= 0, nameof(TopK), "0 or more");
        Require(TopP is null or (>= 0f and <= 1f), nameof(TopP), "from 0 to 1");
        Require(MinP is null or (>= 0f and <= 1f), nameof(MinP), "from 0 to 1");
        Require(RepetitionPenalty is null or (> 0f and < float.PositiveInfinity), nameof(RepetitionPenalty), "more than 0");
        Require(PresencePenalty is >= -2f and <= 2f, nameof(PresencePenalty), "from -2 to 2");
        Require(FrequencyPenalty is >= -2f and <= 2f, nameof(FrequencyPenalty), "from -2 to 2");
        Require(LogProbs is null or (>= 0 and <= LogProbsMax), nameof(LogProbs), $"from 0 to {LogProbsMax}");
        foreach ((int token, float bias) in LogitBias ?? EmptyBias)
        {
            Require(token >= 0, nameof(LogitBias), $"given for token ids of 0 or more, not {token}");
            Require(bias < float.PositiveInfinity, nameof(LogitBias), $"less than infinity, not {bias} for token {token}");
        }
    }

    /// <summary>Replaces what is null by the checkpoint's defaults and the engine's seed. Validates first.</summary>
    internal SamplingParameters Resolve(in SamplingDefaults defaults, ulong engineSeed)
    {
        Validate();
        return new SamplingParameters
        {
            Temperature = Temperature ?? defaults.Temperature,
            TopK = TopK ?? defaults.TopK,
            TopP = TopP ?? defaults.TopP,
            MinP = MinP ?? defaults.MinP,
            RepetitionPenalty = RepetitionPenalty ?? defaults.RepetitionPenalty,
            PresencePenalty = PresencePenalty,
            FrequencyPenalty = FrequencyPenalty,
            LogitBias = LogitBias is null ? [] : [.. LogitBias.OrderBy(pair => pair.Key)],
            Seed = Seed ?? engineSeed,
            LogProbs = LogProbs,
        };
    }

    private static Dictionary<int, float> EmptyBias { get; } = [];

    private static void Require(bool holds, string property, string range)
    {
        if (!holds)
        {
            throw new ArgumentException($"{property} must be {range}.", property);
        }
    }
}

/// <summary>A token and the natural logarithm of its probability.</summary>
/// <param name="TokenId">The token's id in the model's vocabulary.</param>
/// <param name="LogProb">Natural logarithm of its probability; 0 is certain.</param>
public readonly record struct TokenLogProb(int TokenId, float LogProb);
