namespace FlexLLM.Graph.Parallelization;

/// <summary>One rank of the tensor-parallel group and its link to the others. Rates are per second, of one direction.</summary>
internal sealed record MachineModel
{
    public required double FlopsPerSecond { get; init; }

    public required double MemoryBytesPerSecond { get; init; }

    /// <summary>Seconds to start one collective, whatever its size.</summary>
    public required double LinkLatencySeconds { get; init; }

    public required double LinkBytesPerSecond { get; init; }

    /// <summary>Bytes that a rank has for the bypass.</summary>
    public required double MemoryBytes { get; init; }

    /// <summary>Width of weights and activations. Gradients and optimizer moments are F32.</summary>
    public required int BytesPerElement { get; init; }

    /// <summary>Throws unless every number is positive (latency may be 0).</summary>
    public void Validate()
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(FlopsPerSecond);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(MemoryBytesPerSecond);
        ArgumentOutOfRangeException.ThrowIfNegative(LinkLatencySeconds);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(LinkBytesPerSecond);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(MemoryBytes);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(BytesPerElement);
    }
}

/// <summary>Tokens of one batch, and of one optimizer step; 0 a step means that the bypass only serves.</summary>
internal readonly record struct PlanTokens(int PerBatch, int PerStep)
{
    public bool Training => PerStep > 0;
}

/// <summary>What a plan costs a rank on a machine.</summary>
internal sealed record PlanCost
{
    private const int GradientBytes = 4;
    private const int MomentBytes = 8;

    /// <summary>Forward pass of one batch.</summary>
    public required double ForwardSeconds { get; init; }

    /// <summary>Backward pass of one batch; 0 where the bypass only serves, as all below.</summary>
    public required double BackwardSeconds { get; init; }

    /// <summary>One optimizer step: partial weight gradients summed over the ranks, then AdamW on the rank's weights.</summary>
    public required double StepSeconds { get; init; }

    /// <summary>Per batch, with its share of the step. What the planner minimizes.</summary>
    public required double TotalSeconds { get; init; }

    public required double WeightBytes { get; init; }

    public required double GradientAndOptimizerBytes { get; init; }

    /// <summary>Operator inputs of one batch, kept for its backward pass.</summary>
    public required double SavedBytes { get; init; }

    public double MemoryBytes => WeightBytes + GradientAndOptimizerBytes + SavedBytes;

    public static PlanCost Of(PlanDemand demand, PlanTokens tokens, int ranks, MachineModel machine)
    {
        double bytes = machine.BytesPerElement;
        double touched = (demand.Weights + (tokens.PerBatch * demand.Inputs)) * bytes;
        double forward = Pass(demand.ForwardFlops, touched, demand.ForwardSent, demand.ForwardCollectives);
        double backward = 0, step = 0, share = 0;
        if (tokens.Training)
        {
            // dX reads the weights, dW the inputs; both read and write gradients of the same sizes.
            backward = Pass(demand.BackwardFlops, 2 * touched, demand.BackwardSent, demand.BackwardCollectives);
            step = (demand.Weights * (bytes + GradientBytes + MomentBytes) / machine.MemoryBytesPerSecond)
                + Reduction(demand.StepReduced);
            share = (double)tokens.PerBatch / tokens.PerStep;
        }

        return new PlanCost
        {
            ForwardSeconds = forward,
            BackwardSeconds = backward,
            StepSeconds = step,
            TotalSeconds = forward + backward + (share * step),
            WeightBytes = demand.Weights * bytes,
            GradientAndOptimizerBytes = tokens.Training ? demand.Weights * (GradientBytes + MomentBytes) : 0,
            SavedBytes = tokens.Training ? tokens.PerBatch * demand.Inputs * bytes : 0,
        };

        // Roofline for the arithmetic, then the links: a bypass is too short to overlap its own collectives.
        double Pass(double flops, double memory, double sent, int collectives) =>
            Math.Max(tokens.PerBatch * flops / machine.FlopsPerSecond, memory / machine.MemoryBytesPerSecond)
            + (tokens.PerBatch * sent * bytes / machine.LinkBytesPerSecond)
            + (collectives * machine.LinkLatencySeconds);

        double Reduction(double elements) => elements == 0 ? 0 : machine.LinkLatencySeconds
            + (2 * (ranks - 1.0) / ranks * elements * GradientBytes / machine.LinkBytesPerSecond);
    }
}
