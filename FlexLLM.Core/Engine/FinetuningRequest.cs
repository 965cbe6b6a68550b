namespace FlexLLM;

/// <summary>A finetuning job: a dataset, an adapter, an optimizer.</summary>
public sealed record FinetuningRequest
{
    /// <summary>
    /// Name under which versions of the adapter are served. A new name starts from <see cref="Method"/> (which answers like the bare
    /// model until the first step is published); an existing adapter is trained further.
    /// </summary>
    public required string Adapter { get; init; }

    /// <summary>Samples to learn.</summary>
    public required TrainingDataset Dataset { get; init; }

    /// <summary>
    /// Method and shape of a new adapter: a <see cref="LoraConfig"/>, a <see cref="SerialAdapterConfig"/> or an
    /// <see cref="Ia3Config"/>; null takes LoRA's defaults. Must be null, or equal, when the adapter exists.
    /// </summary>
    public PeftConfig? Method { get; init; }

    /// <summary>Update rule.</summary>
    /// <value>AdamW with its defaults.</value>
    public OptimizerOptions Optimizer { get; init; } = new AdamWOptions();

    /// <summary>Passes over the dataset.</summary>
    public int Epochs { get; init; } = 1;

    /// <summary>Samples to one optimizer step; loss and gradients are averaged over all their targets.</summary>
    public int GradientAccumulation { get; init; } = 1;

    /// <summary>Seed of the order of samples in each epoch, or null to keep the dataset's order.</summary>
    public ulong? ShuffleSeed { get; init; } = 0;

    /// <summary>Seed of a new adapter's initial weights.</summary>
    public ulong InitializationSeed { get; init; }

    /// <summary>Longest sample, in tokens; null takes the engine's context.</summary>
    public int? SampleTokensMax { get; init; }

    /// <summary>
    /// Refuse the job when a sample is empty, too long or without a target, instead of skipping it with a count.
    /// </summary>
    public bool RefuseBadSamples { get; init; }

    /// <summary>
    /// Publishes a new version of the adapter after every so many steps, where the device has room for one; null publishes at the
    /// end of the job alone.
    /// </summary>
    public int? PublishEverySteps { get; init; }

    /// <summary>
    /// Most bytes of activations kept from the forward to the backward pass, keys and values not counted. What does not fit is
    /// computed again, which takes time and changes no bit. Null keeps all but what is cheap to compute again.
    /// </summary>
    public long? SavedBytesMax { get; init; }

    /// <summary>
    /// Keeps activations in bfloat16: about half the bytes, but gradients are not exact any more. Nothing changes where the device has
    /// them in bfloat16 anyway.
    /// </summary>
    public bool SavesAsBF16 { get; init; }

    /// <summary>Share of the finetuning time relative to other jobs, a positive, finite number.</summary>
    public double Weight { get; init; } = 1;

    /// <summary>
    /// Each level counts like four times the <see cref="Weight"/>: urgent jobs get most of the time, no job none. -8 to 8.
    /// </summary>
    public int Priority { get; init; }

    /// <summary>
    /// Folder of a checkpoint that <see cref="FinetuningJob.SaveCheckpointAsync"/> wrote for the same request, or null.
    /// </summary>
    public string? ResumeFrom { get; init; }

    internal const double SharePerPriority = 4.0;

    internal void Validate()
    {
        Require(!string.IsNullOrWhiteSpace(Adapter), nameof(Adapter), "must not be empty");
        Require(Dataset is not null, nameof(Dataset), "must not be null");
        Require(Epochs is >= 1 and <= 10_000, nameof(Epochs), "must be 1 to 10,000");
        Require(GradientAccumulation is >= 1 and <= 100_000, nameof(GradientAccumulation), "must be 1 to 100,000");
        Require(SampleTokensMax is null or >= 2, nameof(SampleTokensMax), "must be at least 2");
        Require(PublishEverySteps is null or >= 1, nameof(PublishEverySteps), "must be at least 1");
        Require(SavedBytesMax is null or >= 0, nameof(SavedBytesMax), "must not be negative");
        Require(double.IsFinite(Weight) && Weight > 0, nameof(Weight), "must be a positive, finite number");
        Require(Priority is >= -8 and <= 8, nameof(Priority), "must be -8 to 8");
        Require(Optimizer is not null, nameof(Optimizer), "must not be null");
        Optimizer!.Validate();
    }

    private static void Require(bool condition, string property, string rule)
    {
        if (!condition)
        {
            throw new RequestRejectedException($"FinetuningRequest.{property} {rule}.");
        }
    }
}

/// <summary>State of a finetuning job.</summary>
public enum FinetuningStatus
{
    /// <summary>Takes its share of every step's slack.</summary>
    Running,

    /// <summary>Does nothing until it is resumed; see <see cref="FinetuningJob.PauseAsync"/> for what it keeps.</summary>
    Paused,

    /// <summary>All steps done; the last version is published.</summary>
    Completed,

    /// <summary>Stopped by the caller or by the engine's disposal.</summary>
    Cancelled,

    /// <summary>Stopped by an error, such as a loss that is no number.</summary>
    Failed,
}

/// <summary>Where a job stands after an optimizer step, or at a change of its status.</summary>
/// <param name="Status">State of the job.</param>
/// <param name="Step">Optimizer steps done.</param>
/// <param name="Steps">Optimizer steps of the whole job.</param>
/// <param name="Epoch">Passes over the dataset begun, from 1.</param>
/// <param name="Loss">Mean cross-entropy per target of the last group, in nats; NaN before the first step.</param>
/// <param name="TokensDone">Tokens trained so far, each counted once a pass.</param>
/// <param name="TokensPerSecond">Speed since the job started, pauses included.</param>
/// <param name="Remaining">Time to the end at that speed, or null before the first token.</param>
public readonly record struct FinetuningProgress(
    FinetuningStatus Status, int Step, int Steps, int Epoch, double Loss, long TokensDone, double TokensPerSecond, TimeSpan? Remaining);
