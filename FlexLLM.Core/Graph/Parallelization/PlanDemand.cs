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
        MoveStep[] forward = [.. plan.Forward.OfType<MoveStep>().Where(move => move.Communicates(ranks))];
        GradientStep[] backward = [.. plan.Backward.Where(step => step.Move is not null)];
        return new PlanDemand
        {
            ForwardFlops = operators.Sum(step => ForwardFlopsOf(step, ranks)),
            ForwardSent = forward.Sum(move => move.Operator.ElementsSent(move.Width, ranks, move.SourceEverywhere)),
            ForwardCollectives = forward.Length,
            BackwardFlops = operators.Sum(step => BackwardFlopsOf(step, ranks)),
            BackwardSent = backward.Sum(step => step.Move!.Value.ElementsSent(step.Width, ranks, sourceEverywhere: false)),
            BackwardCollectives = backward.Length,
            Weights = plan.Parameters.Sum(parameter => parameter.ElementsOnRank(ranks)),
            Inputs = operators.Sum(step => step.InputWidth / (step.Case.Input.IsSplit ? (double)ranks : 1)),
            StepReduced = plan.Parameters
                .Where(parameter => parameter.GradientIsPartial)
                .Sum(parameter => parameter.ElementsOnRank(ranks)),
        };
    }

    /// <summary>Is this plan no worse in anything and better in something? Inference has no backward pass and no step.</summary>
    public bool Dominates(PlanDemand other, bool training)
    {
        double[] mine = Coordinates(training);
        double[] theirs = other.Coordinates(training);
        return mine.Zip(theirs).All(pair => pair.First <= pair.Second) && mine.Zip(theirs).Any(pair => pair.First < pair.Second);
    }

    /// <summary>Of the rank that has most to do, which is rank 0 where it alone adds a bias. Activations count nothing.</summary>
    private static double ForwardFlopsOf(ComputeStep step, int ranks) => step.Operator.Kind switch
    {
        BypassOperatorKind.Linear => (2 * Products(step, ranks)) + Biases(step, ranks),
        BypassOperatorKind.ElementwiseLinear => Products(step, ranks),
        _ => 0,
    };

    /// <summary>A linear's dX, dW and db; a vector's dX, and the products and sums of its ds.</summary>
    private static double BackwardFlopsOf(ComputeStep step, int ranks) => step.Operator.Kind switch
    {
        BypassOperatorKind.Linear => (4 * Products(step, ranks)) + Biases(step, ranks),
        BypassOperatorKind.ElementwiseLinear => 3 * Products(step, ranks),
        _ => 0,
    };

    private static double Products(ComputeStep step, int ranks)
    {
        double all = step.Operator.Kind == BypassOperatorKind.Linear ? (double)step.InputWidth * step.OutputWidth : step.InputWidth;
        return all / (step.Case.IsShared ? ranks : 1);
    }

    private static double Biases(ComputeStep step, int ranks) =>
        step.Operator.HasBias ? step.OutputWidth / (step.Case.Output.IsSplit ? (double)ranks : 1) : 0;

    private double[] Coordinates(bool training) => training
        ? [ForwardFlops, ForwardSent, ForwardCollectives, Weights, Inputs,
            BackwardFlops, BackwardSent, BackwardCollectives, StepReduced]
        : [ForwardFlops, ForwardSent, ForwardCollectives, Weights, Inputs];
}
