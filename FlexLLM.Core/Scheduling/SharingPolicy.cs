namespace FlexLLM;

/// <summary>How requests and finetuning jobs share one engine.</summary>
public enum SharingMode
{
    /// <summary>Every step takes all requests, and the finetuning that their latency targets leave time for.</summary>
    CoServing,

    /// <summary>Requests alone; jobs wait.</summary>
    InferenceOnly,

    /// <summary>After so many steps of inference, requests stand still while one whole sample goes forward and backward.</summary>
    Temporal,

    /// <summary>
    /// As <see cref="Temporal"/>, but the sample starts as soon as every request can wait for its end within its targets, and at
    /// the latest after so many steps.
    /// </summary>
    DynamicTemporal,

    /// <summary>
    /// What the paper's released code does (paper.md e.2): no latency model; finetuning gets the rows that requests leave of a fixed
    /// number of tokens, or a fixed number of whole layers backward.
    /// </summary>
    FixedBudget,
}

/// <summary>
/// A rule by which requests and finetuning share an engine. <see cref="CoServing"/> is what to use; the others are there to be
/// compared with, on the same engine.
/// </summary>
public sealed record SharingPolicy
{
    private SharingPolicy(SharingMode mode) => Mode = mode;

    /// <summary>The default: finetuning in the slack of every step.</summary>
    public static SharingPolicy CoServing { get; } = new(SharingMode.CoServing);

    /// <summary>Requests alone.</summary>
    public static SharingPolicy InferenceOnly { get; } = new(SharingMode.InferenceOnly);

    /// <summary>The rule.</summary>
    public SharingMode Mode { get; }

    /// <summary>Temporal modes: steps of inference between two samples.</summary>
    public int StepsBetween { get; private init; }

    /// <summary>Fixed budget: layers of a sample that one step takes backward.</summary>
    public int BackwardLayers { get; private init; }

    /// <summary>One sample after every <paramref name="steps"/> steps of inference (paper.md e.3).</summary>
    public static SharingPolicy Temporal(int steps) =>
        new(SharingMode.Temporal) { StepsBetween = AtLeastOne(steps, nameof(steps)) };

    /// <summary>One sample whenever requests can wait for it, and after <paramref name="stepsMax"/> steps in any case.</summary>
    public static SharingPolicy DynamicTemporal(int stepsMax = 512) =>
        new(SharingMode.DynamicTemporal) { StepsBetween = AtLeastOne(stepsMax, nameof(stepsMax)) };

    /// <summary>
    /// Whatever the limit on a step's tokens leaves, or <paramref name="backwardLayers"/> layers backward.
    /// </summary>
    public static SharingPolicy FixedBudget(int backwardLayers) =>
        new(SharingMode.FixedBudget) { BackwardLayers = AtLeastOne(backwardLayers, nameof(backwardLayers)) };

    /// <inheritdoc/>
    public override string ToString() => Mode switch
    {
        SharingMode.Temporal => $"temporal-{StepsBetween}",
        SharingMode.DynamicTemporal => "temporal-dynamic",
        SharingMode.FixedBudget => $"fixed-budget-{BackwardLayers}",
        SharingMode.InferenceOnly => "inference-only",
        _ => "co-serving",
    };

    private static int AtLeastOne(int value, string name)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(value, 1, name);
        return value;
    }
}
