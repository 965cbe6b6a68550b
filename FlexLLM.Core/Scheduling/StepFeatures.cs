namespace FlexLLM.Scheduling;

/// <summary>
/// The size of a step in the quantities that its time depends on. Context: over the rows of a kind, the sum of the positions
/// that each attends. Backward rows count once for each layer.
/// </summary>
internal readonly record struct StepFeatures
{
    /// <summary>Where the curve of a backward item's rows bends.</summary>
    public const int BackwardKnot0 = 32;

    public const int BackwardKnot1 = 128;

    public const int BackwardKnot2 = 512;

    public int InferenceRows { get; init; }

    /// <summary>Inference rows whose logits are computed.</summary>
    public int SampledRows { get; init; }

    public long InferenceContext { get; init; }

    /// <summary>Over the sequences, the sum of the positions whose keys and values are read: rows of one prompt share them.</summary>
    public long InferencePositions { get; init; }

    public int ForwardWindows { get; init; }

    public int ForwardRows { get; init; }

    public long ForwardContext { get; init; }

    public int BackwardItems { get; init; }

    public long BackwardRows { get; init; }

    /// <summary>Over the items, the sum of the rows behind each one's first 32.</summary>
    public long BackwardRowsFrom0 { get; init; }

    /// <summary>Behind each one's first 128.</summary>
    public long BackwardRowsFrom1 { get; init; }

    /// <summary>Behind each one's first 512.</summary>
    public long BackwardRowsFrom2 { get; init; }

    public long BackwardContext { get; init; }

    /// <summary>Rows that share one pass over the weights.</summary>
    public int BatchRows => InferenceRows + ForwardRows;

    /// <summary>The part of the step that runs before the backward items.</summary>
    public StepFeatures WithoutBackward() => this with
    {
        BackwardItems = 0,
        BackwardRows = 0,
        BackwardRowsFrom0 = 0,
        BackwardRowsFrom1 = 0,
        BackwardRowsFrom2 = 0,
        BackwardContext = 0,
    };

    /// <summary>Inference alone.</summary>
    public StepFeatures WithoutFinetuning() => WithoutBackward() with { ForwardWindows = 0, ForwardRows = 0, ForwardContext = 0 };

    /// <summary>
    /// Adds <paramref name="tokens"/> inference rows of one sequence, the first at position <paramref name="start"/>, of which
    /// <paramref name="sampled"/> are sampled from.
    /// </summary>
    public StepFeatures WithInference(int start, int tokens, int sampled = 0) => this with
    {
        InferenceRows = InferenceRows + tokens,
        SampledRows = SampledRows + sampled,
        InferenceContext = InferenceContext + ContextOf(start, tokens),
        InferencePositions = InferencePositions + start + tokens,
    };

    /// <summary>Adds a forward window.</summary>
    public StepFeatures WithForward(int start, int tokens) =>
        WithLongerForward(start, tokens) with { ForwardWindows = ForwardWindows + 1 };

    /// <summary>Makes a forward window longer: so many more tokens, the first of them at position <paramref name="start"/>.</summary>
    public StepFeatures WithLongerForward(int start, int tokens) => this with
    {
        ForwardRows = ForwardRows + tokens,
        ForwardContext = ForwardContext + ContextOf(start, tokens),
    };

    /// <summary>Adds a backward window of one layer.</summary>
    public StepFeatures WithBackward(int start, int rows) => this with
    {
        BackwardItems = BackwardItems + 1,
        BackwardRows = BackwardRows + rows,
        BackwardRowsFrom0 = BackwardRowsFrom0 + Math.Max(0, rows - BackwardKnot0),
        BackwardRowsFrom1 = BackwardRowsFrom1 + Math.Max(0, rows - BackwardKnot1),
        BackwardRowsFrom2 = BackwardRowsFrom2 + Math.Max(0, rows - BackwardKnot2),
        BackwardContext = BackwardContext + ContextOf(start, rows),
    };

    // The row at position t attends t + 1 positions.
    private static long ContextOf(int start, int rows) => ((long)rows * start) + ((long)rows * (rows + 1) / 2);
}
