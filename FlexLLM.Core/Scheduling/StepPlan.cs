using System.Collections.Immutable;

namespace FlexLLM.Scheduling;

/// <summary>
/// Compute the next Tokens tokens of a sequence that has ContextLength stored. One token of a decode, or a chunk.
/// </summary>
internal readonly record struct InferenceWork(SequenceId Id, int Tokens, int ContextLength)
{
    public override string ToString() => $"{Id.Value}:{ContextLength}+{Tokens}";
}

/// <summary>Send the next Tokens tokens of a job's sample through all layers.</summary>
internal readonly record struct ForwardWindow(JobId Id, int Tokens)
{
    public override string ToString() => $"{Id.Value}:+{Tokens}";
}

/// <summary>Take rows [RowStart, RowStart + RowCount) of one layer of a job's sample backward.</summary>
internal readonly record struct BackwardWindow(JobId Id, int Layer, int RowStart, int RowCount)
{
    public override string ToString() => $"{Id.Value}:layer {Layer}[{RowStart}..{RowStart + RowCount})";
}

/// <summary>
/// What one step does, in this order: preempt, admit, compute the inference rows and the forward windows in one batch, then
/// the backward windows as listed. The blocks of preempted sequences are free for the same step. Immutable.
/// </summary>
internal sealed record StepPlan
{
    /// <summary>Running sequences that give up all their blocks and wait again.</summary>
    public required ImmutableArray<SequenceId> Preemptions { get; init; }

    /// <summary>Waiting sequences that run from this step on; each has work in it.</summary>
    public required ImmutableArray<SequenceId> Admissions { get; init; }

    /// <summary>Decode rows first, then chunks of prompts.</summary>
    public required ImmutableArray<InferenceWork> Inference { get; init; }

    public required ImmutableArray<ForwardWindow> Forward { get; init; }

    public required ImmutableArray<BackwardWindow> Backward { get; init; }

    /// <summary>The step's size, as <see cref="LatencyModel.Observe"/> wants it with the measured time.</summary>
    public required StepFeatures Features { get; init; }

    /// <summary>How long the step takes at most, with the model's confidence.</summary>
    public required TimeSpan LatencyPredicted { get; init; }

    /// <summary>How long the step may take for finetuning to have a part in it; negative where a request is late.</summary>
    public required TimeSpan Budget { get; init; }

    /// <summary>Whether there is nothing to do.</summary>
    public bool IsEmpty => Features == default && Preemptions.IsEmpty;

    /// <summary>Whether finetuning has a part in the step.</summary>
    public bool HasFinetuning => !Forward.IsEmpty || !Backward.IsEmpty;

    /// <summary>The plan as text, one line, for tests and logs.</summary>
    public override string ToString() =>
        $"preempt [{string.Join(' ', Preemptions.Select(id => id.Value))}] " +
        $"admit [{string.Join(' ', Admissions.Select(id => id.Value))}] " +
        $"infer [{string.Join(' ', Inference)}] forward [{string.Join(' ', Forward)}] backward [{string.Join(' ', Backward)}] " +
        $"{LatencyPredicted.TotalMilliseconds:F2} of {Budget.TotalMilliseconds:F2} ms";
}
