namespace FlexLLM.Graph.Parallelization;

/// <summary>One step of a plan, in forward order, from a tensor of one width and layout to another.</summary>
internal abstract record PlanStep(TensorLayout From, TensorLayout To, int InputWidth, int OutputWidth)
{
    /// <summary>Columns of the input that a rank has; slices of columns are even.</summary>
    public int LocalInputWidth(int ranks) => From.ColumnsOn(0, ranks, InputWidth).Count;

    /// <summary>Columns of the output that a rank has.</summary>
    public int LocalOutputWidth(int ranks) => To.ColumnsOn(0, ranks, OutputWidth).Count;
}

/// <summary>
/// Re-layout of a tensor of <paramref name="Width"/> elements per token. <paramref name="SourceEverywhere"/>: every rank has
/// the whole source, so it takes its share of it (partition) or all of it (replicate) and sends nothing.
/// <paramref name="OnWideEdge"/>: between the backbone and the bypass, not inside the bypass.
/// </summary>
internal sealed record MoveStep(ParallelOperator Operator, int Width, bool SourceEverywhere, bool OnWideEdge)
    : PlanStep(Operator.From, Operator.To, Width, Width)
{
    public bool Communicates(int ranks) => Operator.ElementsSent(Width, ranks, SourceEverywhere) > 0;
}

/// <summary>An operator of the bypass in one of its legal cases.</summary>
internal sealed record ComputeStep(BypassOperator Operator, OperatorCase Case)
    : PlanStep(Case.Input, Case.Output, Operator.InputWidth, Operator.OutputWidth);

/// <summary>
/// The backward counterpart of a forward step, or of the tap where <paramref name="Of"/> is null: the gradient goes from one
/// layout to the other, with an operator where ranks must talk. Without one a rank computes (or passes on) what it has, and where
/// copies become slices keeps its own. For an operator with weights: is a rank's gradient of weight or bias a partial, to be
/// summed over ranks once per optimizer step? <paramref name="Width"/> is that of the gradient that comes out.
/// </summary>
internal sealed record GradientStep(
    PlanStep? Of,
    TensorLayout From,
    TensorLayout To,
    int Width,
    ParallelOperator? Move = null,
    bool WeightGradientIsPartial = false,
    bool BiasGradientIsPartial = false)
{
    /// <summary>Does a rank cut its share out of a copy that it has?</summary>
    public bool KeepsShare => Move is null && To.IsSplit && !From.IsSplit && Of is not ComputeStep;
}

/// <summary>
/// A legal parallel execution of a bypass on a fixed tap, forward and backward. The steps and <see cref="Parameters"/> say all that
/// one rank has to do: which slices it holds, what it computes on them, and when it talks to the others.
/// </summary>
internal sealed class BypassPlan
{
    public BypassPlan(BypassTap tap, AddPoint add, int ranks, IReadOnlyList<PlanStep> forward)
    {
        (Tap, Add, Ranks, Forward) = (tap, add, ranks, forward);
        Backward = Differentiate(tap, add, forward);
        Parameters = [.. Backward.Reverse().SelectMany(ParametersOf)];
    }

    public BypassTap Tap { get; }

    public AddPoint Add { get; }

    public int Ranks { get; }

    public IReadOnlyList<PlanStep> Forward { get; }

    /// <summary>From the add back to the tap.</summary>
    public IReadOnlyList<GradientStep> Backward { get; }

    /// <summary>What there is to train, in the order of the operators, the bias after its weight.</summary>
    public IReadOnlyList<PlanParameter> Parameters { get; }

    /// <summary>
    /// Layout in which dX comes out. Where the tap names none, it joins the partial sums of the base linear's dX: partials as they
    /// are, a slice in its place, copies on one rank only.
    /// </summary>
    public TensorLayout InputGradient => Backward[^1].To;

    /// <summary>Layouts in order, and what leads from each to the next: "X[-,-,-] -replicate-> [=,-,-] A(1) ...".</summary>
    public override string ToString()
    {
        IEnumerable<string> steps = Forward.Select(step => step switch
        {
            MoveStep move => $"-{move.Operator.Label}-> {move.To}",
            ComputeStep { Case.Number: 0 } compute => $"{compute.Operator.Name} {compute.To}",
            ComputeStep compute => $"{compute.Operator.Name}({compute.Case.Number}){BiasText(compute)} {compute.To}",
            _ => throw new ArgumentOutOfRangeException(nameof(step), step, "Print the new kind of step here."),
        });
        return $"X{Tap.Input} {string.Join(' ', steps)} {Add.Name}";
    }

    private static string BiasText(ComputeStep step) => !step.Operator.HasBias
        ? ""
        : OperatorRules.BiasOf(step.Case).OnRankZeroOnly ? "+bias on rank 0" : "+bias";

    private static List<GradientStep> Differentiate(BypassTap tap, AddPoint add, IReadOnlyList<PlanStep> forward)
    {
        TensorLayout gradient = add.Gradient;
        List<GradientStep> backward = [];
        foreach (PlanStep step in forward.Reverse())
        {
            GradientStep counterpart = step switch
            {
                // The source is X whole on all ranks, each of which used a part or all of it: dX stays what the parts give.
                MoveStep { SourceEverywhere: true } => new(step, gradient, gradient, step.InputWidth),
                MoveStep move => Counterpart(move, gradient),
                ComputeStep compute => Counterpart(compute, gradient),
                _ => throw new ArgumentOutOfRangeException(nameof(forward), step, "Differentiate the new kind of step here."),
            };
            backward.Add(counterpart);
            gradient = counterpart.To;
        }

        if (tap.InputGradient is { } wanted && gradient != wanted)
        {
            ParallelOperator move = ParallelOperator.All.Single(o => o.From == gradient && o.To == wanted);
            backward.Add(new GradientStep(null, gradient, wanted, forward[0].InputWidth, move));
        }

        return backward;
    }

    private static GradientStep Counterpart(MoveStep move, TensorLayout gradient)
    {
        (ParallelOperator? back, TensorLayout result) = move.Operator.Backward(gradient);
        return new GradientStep(move, gradient, result, move.Width, back);
    }

    private static GradientStep Counterpart(ComputeStep compute, TensorLayout gradient)
    {
        if (compute.Case.Weight is null)
        {
            return new GradientStep(compute, gradient, gradient, compute.InputWidth);
        }

        GradientRule rule = OperatorRules.Backward(compute.Case, gradient);
        return new GradientStep(
            compute,
            gradient,
            rule.Input,
            compute.InputWidth,
            null,
            rule.WeightIsPartial,
            compute.Operator.HasBias && rule.BiasIsPartial);
    }

    private static IEnumerable<PlanParameter> ParametersOf(GradientStep step)
    {
        if (step.Of is not ComputeStep { Case.Weight: { } layout } compute)
        {
            yield break;
        }

        yield return new PlanParameter(compute.Operator, ParameterKind.Weight, layout, step.WeightGradientIsPartial);
        if (compute.Operator.HasBias)
        {
            BiasRule bias = OperatorRules.BiasOf(compute.Case);
            yield return new PlanParameter(
                compute.Operator, ParameterKind.Bias, bias.Layout, step.BiasGradientIsPartial, bias.OnRankZeroOnly);
        }
    }
}
