namespace FlexLLM.Graph.Parallelization;

/// <summary>
/// Which legal plans the search leaves out. Legality alone admits more plans than the paper lists; each rule names one family
/// of the surplus. Only <see cref="GathersRank"/> costs plans that a machine would often want.
/// </summary>
internal sealed record SearchRules
{
    /// <summary>Exactly the candidates of paper.md b.4 and b.5.</summary>
    public static SearchRules Paper { get; } = new();

    /// <summary>Everything that is legal.</summary>
    public static SearchRules Full { get; } = new()
    {
        MovesOnBothEdges = true,
        ReducesDeferredSums = true,
        GathersRank = true,
    };

    /// <summary>
    /// May a plan communicate both on a wide edge (tap or add) and inside the bypass? It pays for two re-layouts where one does;
    /// what it gains is at most rank elements of saved activation per token.
    /// </summary>
    public bool MovesOnBothEdges { get; init; }

    /// <summary>
    /// May an operator with weights run on partials (cases 5 and 9) when the bypass then reduces the wide result itself? Deferring
    /// a sum pays where it rides on a reduction of the backbone.
    /// </summary>
    public bool ReducesDeferredSums { get; init; }

    /// <summary>
    /// May inner columns (the LoRA rank) that were split be gathered again? The figure of the paper has no such plan, though
    /// A(4), all-gather, B(4) sends half of what C2 sends and holds the same weights; it reads all of X where C2 reads a slice.
    /// </summary>
    public bool GathersRank { get; init; }

    public bool Allow(BypassPlan plan)
    {
        MoveStep[] moves = [.. plan.Forward.OfType<MoveStep>().Where(move => move.Communicates(plan.Ranks))];
        bool onBothEdges = moves.Any(move => move.OnWideEdge) && moves.Any(move => !move.OnWideEdge);
        bool reducesDeferredSum = plan.Forward
            .SkipWhile(step => step is not ComputeStep { Case.Number: 5 or 9 })
            .Any(step => step.To != TensorLayout.PreReduce);
        bool gathersRank = moves.Any(move =>
            !move.OnWideEdge
            && move.Operator.Kind == ParallelOperatorKind.AllGather
            && move.Operator.From == TensorLayout.SplitColumns);

        return (MovesOnBothEdges || !onBothEdges)
            && (ReducesDeferredSums || !reducesDeferredSum)
            && (GathersRank || !gathersRank);
    }
}
