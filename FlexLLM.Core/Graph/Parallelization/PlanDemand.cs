namespace FlexLLM.Graph.Parallelization;

/// <summary>
/// What a plan asks of each rank, independent of any machine; flops and elements are per token except where said. Every cost
/// below grows with each of these numbers, so a plan that is no better in any of them is never cheaper.
/// </summary>
internal sealed record PlanDemand
{
    public required double ForwardFlops { get; init; }

    public required double ForwardSent { get; init; }

    public required int ForwardCollectives { get; init; }

    public required double BackwardFlops { get; init; }

    public required double BackwardSent { get; init; }

    public required int BackwardCollectives { get; init; }

    /// <summary>Weight elements that a rank holds.</summary>
    public required double Weights { get; init; }

    /// <summary>Elements of operator inputs: read by the forward pass, kept for and read again by the backward pass.</summary>
    public required double Inputs { get; init; }

    /// <summary>Weight gradient elements that all ranks sum once per optimizer step.</summary>
    public required double StepReduced { get; init; }

    public static PlanDemand Of(BypassPlan plan)
    {
        int ranks = plan.Ranks;
        ComputeStep[] operators = [.. plan.Forward.OfType<ComputeStep>()];
        ComputeStep[] linears = [.. operators.Where(step => step.Operator.Kind == BypassOperatorKind.Linear)];
        MoveStep[] forward = [.. plan.Forward.OfType<MoveStep>().Where(move => move.Communicates(ranks))];
        MoveStep[] backward = [.. plan.Backward
            .Where(step => step.Move is not null)
            .Select(step => new MoveStep(step.Move!.Value, ((MoveStep)step.Of).Width, false, false))];

        double flops = linears.Sum(step => 2 * Elements(step) / (step.Case.IsShared ? ranks : 1));
        return new PlanDemand
        {
            ForwardFlops = flops,
            ForwardSent = Sent(forward, ranks),
            ForwardCollectives = forward.Length,
            BackwardFlops = 2 * flops, // dX and dW.
            BackwardSent = Sent(backward, ranks),
            BackwardCollectives = backward.Length,
            Weights = linears.Sum(step => LocalWeights(step, ranks)),
            Inputs = operators
                .Where(step => step.Operator.Kind != BypassOperatorKind.ElementwiseLinear)
                .Sum(step => step.Operator.InputWidth / (step.Case.Input.IsSplit ? (double)ranks : 1)),
            StepReduced = plan.Backward
                .Where(step => step.WeightGradientIsPartial)
                .Sum(step => LocalWeights((ComputeStep)step.Of, ranks)),
        };
    }

    /// <summary>Is this plan no worse in anything and better in something? Inference has no backward pass and no step.</summary>
    public bool Dominates(PlanDemand other, bool training)
    {
        double[] mine = Coordinates(training);
        double[] theirs = other.Coordinates(training);
        return mine.Zip(theirs).All(pair => pair.First <= pair.Second) && mine.Zip(theirs).Any(pair => pair.First < pair.Second);
    }

    private static double Sent(IEnumerable<MoveStep> moves, int ranks) =>
        moves.Sum(move => move.Operator.ElementsSent(move.Width, ranks, move.SourceEverywhere));

    private static double Elements(ComputeStep step) => (double)step.Operator.InputWidth * step.Operator.OutputWidth;

    private static double LocalWeights(ComputeStep step, int ranks) =>
        Elements(step) / (step.Case.Weight is { IsSplit: true } ? ranks : 1);

    private double[] Coordinates(bool training) => training
        ? [ForwardFlops, ForwardSent, ForwardCollectives, Weights, Inputs,
            BackwardFlops, BackwardSent, BackwardCollectives, StepReduced]
        : [ForwardFlops, ForwardSent, ForwardCollectives, Weights, Inputs];
}
