namespace FlexLLM.Graph;

/// <summary>Values of one role summed over the layers.</summary>
/// <param name="Role">Name of the value without its layer.</param>
/// <param name="Layers">How many layers have it.</param>
/// <param name="Columns">32-bit elements per token in one of them.</param>
internal readonly record struct RoleSum(string Role, int Layers, int Columns)
{
    /// <summary>Elements per token over all layers.</summary>
    public long ColumnsTotal => (long)Layers * Columns;
}

/// <summary>What a graph keeps from forward to backward after a pass, and what it computes again.</summary>
internal sealed record PassReport
{
    public required string Pass { get; init; }

    public required int ForwardNodes { get; init; }

    public required int BackwardNodes { get; init; }

    /// <summary>Values kept, keys and values of the sample among them; largest in total first.</summary>
    public required IReadOnlyList<RoleSum> Kept { get; init; }

    /// <summary>Values computed again in the backward pass.</summary>
    public required IReadOnlyList<RoleSum> Recomputed { get; init; }

    /// <summary>Flops per token of what is computed again.</summary>
    public required double RecomputedFlops { get; init; }

    public long KeptColumns => Kept.Sum(k => k.ColumnsTotal);

    /// <summary>Before differentiation nothing says what will be read: every activation counts as kept.</summary>
    /// <param name="result">A pass and its graph.</param>
    /// <param name="sequenceTokens">Length of a sample: what attention costs to compute again.</param>
    public static PassReport Of(PassResult result, int sequenceTokens)
    {
        ParallelGraph graph = result.Graph;
        GraphNode[] recomputed = [.. graph.Nodes.Where(n => n.Recomputes)];
        IEnumerable<GraphValue> kept = graph.Nodes.Any(n => n.IsBackward) ? GraphPruner.SavedSet(graph) : ForwardActivations(graph);
        return new PassReport
        {
            Pass = result.Pass,
            ForwardNodes = graph.Nodes.Count(n => !n.IsBackward),
            BackwardNodes = graph.Nodes.Count(n => n.IsBackward),
            Kept = ByRole(kept.Where(v => IsInLayers(v))),
            Recomputed = ByRole(recomputed.Where(n => n.Op != OpKind.Unpack).SelectMany(n => n.Outputs).Select(o => graph.Values[o])),
            RecomputedFlops = recomputed.Sum(n => OpCosts.FlopsOf(graph, n, sequenceTokens)),
        };
    }

    /// <summary>Every activation of the layers: what a framework that frees nothing holds.</summary>
    public static IEnumerable<GraphValue> ForwardActivations(ParallelGraph graph) => graph.Nodes
        .Where(n => !n.IsBackward).SelectMany(n => n.Outputs).Select(o => graph.Values[o]).Where(IsInLayers);

    /// <summary>The name without its layer: "layers.3.gate" is "gate" in every layer.</summary>
    public static string RoleOf(string name)
    {
        const string Prefix = "layers.";
        return name.StartsWith(Prefix, StringComparison.Ordinal) ? name[(name.IndexOf('.', Prefix.Length) + 1)..] : name;
    }

    private static bool IsInLayers(GraphValue value) => value.Name.StartsWith("layers.", StringComparison.Ordinal);

    private static List<RoleSum> ByRole(IEnumerable<GraphValue> values) =>
    [
        .. values.GroupBy(v => RoleOf(v.Name)).Select(g => new RoleSum(g.Key, g.Count(), g.First().Columns))
            .OrderByDescending(r => r.ColumnsTotal).ThenBy(r => r.Role, StringComparer.Ordinal),
    ];
}
