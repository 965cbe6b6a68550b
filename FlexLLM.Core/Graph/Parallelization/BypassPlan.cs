using FlexLLM.Primitives;

namespace FlexLLM.Graph.Parallelization;

/// <summary>One step of a plan, in forward order.</summary>
internal abstract record PlanStep(TensorLayout From, TensorLayout To);

/// <summary>
/// Re-layout of a tensor of <paramref name="Width"/> elements per token. <paramref name="SourceEverywhere"/>: every rank has
/// the whole source. <paramref name="OnWideEdge"/>: between the backbone and the bypass, not inside the bypass.
/// </summary>
internal sealed record MoveStep(ParallelOperator Operator, int Width, bool SourceEverywhere, bool OnWideEdge)
    : PlanStep(Operator.From, Operator.To)
{
    public bool Communicates(int ranks) => Operator.ElementsSent(Width, ranks, SourceEverywhere) > 0;
}

/// <summary>An operator of the bypass in one of its legal cases.</summary>
internal sealed record ComputeStep(BypassOperator Operator, OperatorCase Case) : PlanStep(Case.Input, Case.Output);

/// <summary>
/// The backward counterpart of a forward step: the gradient goes from one layout to the other, with an operator where ranks
/// must talk. For a linear: is its weight gradient a partial, to be summed over ranks once per optimizer step?
/// </summary>
internal sealed record GradientStep(
    PlanStep Of, TensorLayout From, TensorLayout To, ParallelOperator? Move = null, bool WeightGradientIsPartial = false);

/// <summary>A legal parallel execution of a bypass on a fixed tap, forward and backward.</summary>
internal sealed class BypassPlan
{
    public BypassPlan(BypassTap tap, AddPoint add, int ranks, IReadOnlyList<PlanStep> forward)
    {
        (Tap, Add, Ranks, Forward) = (tap, add, ranks, forward);
        Backward = Differentiate(tap, add, forward);
    }

    public BypassTap Tap { get; }

    public AddPoint Add { get; }

    public int Ranks { get; }

    public IReadOnlyList<PlanStep> Forward { get; }

    /// <summary>From the add back to the tap.</summary>
    public IReadOnlyList<GradientStep> Backward { get; }

    /// <summary>Layouts in order, and what leads from each to the next: "X[-,-,-] -replicate-> [=,-,-] A(1) ...".</summary>
    public override string ToString()
    {
        IEnumerable<string> steps = Forward.Select(step => step switch
        {
            MoveStep move => $"-{move.Operator.Label}-> {move.To}",
            ComputeStep { Case.Number: 0 } compute => $"{compute.Operator.Name} {compute.To}",
            ComputeStep compute => $"{compute.Operator.Name}({compute.Case.Number}) {compute.To}",
            _ => throw new ArgumentOutOfRangeException(nameof(step), step, "Print the new kind of step here."),
        });
        return $"X{Tap.Input} {string.Join(' ', steps)} {Add.Name}";
    }

    private static List<GradientStep> Differentiate(BypassTap tap, AddPoint add, IReadOnlyList<PlanStep> forward)
    {
        TensorLayout gradient = add.Gradient;
        List<GradientStep> backward = [];
        foreach (PlanStep step in forward.Reverse())
        {
            GradientStep counterpart = step switch
            {
                // The source is X whole on all ranks: dX joins the partial sums of the base linear as it is.
                MoveStep { SourceEverywhere: true } => new(step, gradient, gradient),
                MoveStep move => Counterpart(move, gradient),
                ComputeStep compute => Counterpart(compute, gradient),
                _ => throw new ArgumentOutOfRangeException(nameof(forward), step, "Differentiate the new kind of step here."),
            };
            backward.Add(counterpart);
            gradient = counterpart.To;
        }

        Check.That(tap.InputEverywhere || gradient == tap.Input);
        return backward;
    }

    private static GradientStep Counterpart(MoveStep move, TensorLayout gradient)
    {
        (ParallelOperator? back, TensorLayout result) = move.Operator.Backward(gradient);
        return new GradientStep(move, gradient, result, back);
    }

    private static GradientStep Counterpart(ComputeStep compute, TensorLayout gradient)
    {
        if (compute.Operator.Kind != BypassOperatorKind.Linear)
        {
            return new GradientStep(compute, gradient, gradient);
        }

        (TensorLayout input, bool isPartial) = OperatorRules.LinearBackward(compute.Case, gradient);
        return new GradientStep(compute, gradient, input, null, isPartial);
    }
}
