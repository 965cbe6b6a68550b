namespace FlexLLM.Graph;

/// <summary>Values of one role summed over the layers.</summary>
/// <param name="Role">Name of the value without its layer.</param>
/// <param name="Layers">How many layers have it.</param>
/// <param name="Columns">Elements per token in one of them; where packed, the 32-bit containers.</param>
/// <param name="Is32Bit">Four bytes a column however wide elements are: the log-sum-exp of attention, and packed rows.</param>
internal readonly record struct RoleSum(string Role, int Layers, int Columns, bool Is32Bit)
{
    /// <summary>Elements per token over all layers.</summary>
    public long ColumnsTotal => (long)Layers * Columns;

    /// <summary>Bytes per token in one layer, at a width of elements in bytes.</summary>
    public long BytesPerLayer(int elementBytes) => (long)Columns * (Is32Bit ? sizeof(float) : elementBytes);

    /// <summary>Bytes per token over all layers.</summary>
    public long Bytes(int elementBytes) => Layers * BytesPerLayer(elementBytes);
}

/// <summary>What a graph keeps from forward to backward after a pass, and what it computes again.</summary>
internal sealed record PassReport
{
    public required string Pass { get; init; }

    public required int ForwardNodes { get; init; }

    public required int BackwardNodes { get; init; }

    /// <summary>Values kept, keys and values of the sample among them; largest in total first.</summary>
    public required IReadOnlyList<RoleSum> Kept { get; init; }

    /// <summary>What the pass before kept and this one does not. A role may be kept in fewer layers than before.</summary>
    public required IReadOnlyList<RoleSum> Freed { get; init; }

    /// <summary>Values computed again in the backward pass.</summary>
    public required IReadOnlyList<RoleSum> Recomputed { get; init; }

    /// <summary>Flops per token of what is computed again.</summary>
    public required double RecomputedFlops { get; init; }

    public long KeptColumns => Kept.Sum(k => k.ColumnsTotal);

    /// <summary>Bytes kept per token, at a width of elements in bytes.</summary>
    public long KeptBytes(int elementBytes) => Kept.Sum(k => k.Bytes(elementBytes));

    /// <summary>A report a pass, in order.</summary>
    /// <param name="passes">Passes with their graphs.</param>
    /// <param name="sequenceTokens">Length of a sample: what attention costs to compute again.</param>
    public static IReadOnlyList<PassReport> Of(IEnumerable<PassResult> passes, int sequenceTokens)
    {
        List<PassReport> reports = [];
        foreach (PassResult pass in passes)
        {
            reports.Add(Of(pass, sequenceTokens, reports.Count == 0 ? [] : reports[^1].Kept));
        }

        return reports;
    }

    /// <summary>Every activation of the layers: what a framework that frees nothing holds.</summary>
    public static IReadOnlyList<RoleSum> ForwardActivations(ParallelGraph graph) => ByRole(
        graph, graph.Nodes.Where(n => !n.IsBackward).SelectMany(n => n.Outputs).Select(o => graph.Values[o]).Where(IsInLayers));

    /// <summary>What a graph keeps in its layers from forward to backward, by role.</summary>
    public static IReadOnlyList<RoleSum> Saved(ParallelGraph graph) =>
        ByRole(graph, GraphPruner.SavedSet(graph).Where(IsInLayers));

    /// <summary>The name without its layer: "layers.3.gate" is "gate" in every layer.</summary>
    public static string RoleOf(string name)
    {
        const string Prefix = "layers.";
        return name.StartsWith(Prefix, StringComparison.Ordinal) ? name[(name.IndexOf('.', Prefix.Length) + 1)..] : name;
    }

    // Before differentiation nothing says what will be read: every activation counts as kept.
    private static PassReport Of(PassResult result, int sequenceTokens, IReadOnlyList<RoleSum> before)
    {
        ParallelGraph graph = result.Graph;
        GraphNode[] recomputed = [.. graph.Nodes.Where(n => n.Recomputes)];
        IReadOnlyList<RoleSum> kept = graph.Nodes.Any(n => n.IsBackward) ? Saved(graph) : ForwardActivations(graph);
        return new PassReport
        {
            Pass = result.Pass,
            ForwardNodes = graph.Nodes.Count(n => !n.IsBackward),
            BackwardNodes = graph.Nodes.Count(n => n.IsBackward),
            Kept = kept,
            Freed = Minus(before, kept),
            Recomputed = ByRole(
                graph, recomputed.Where(n => n.Op != OpKind.Unpack).SelectMany(n => n.Outputs).Select(o => Original(graph.Values[o]))),
            RecomputedFlops = recomputed.Sum(n => OpCosts.FlopsOf(graph, n, sequenceTokens)),
        };
    }

    private static GraphValue Original(GraphValue again) =>
        again with { Name = again.Name.Replace(Rematerializer.Suffix, string.Empty, StringComparison.Ordinal) };

    public static IReadOnlyList<RoleSum> Minus(IReadOnlyList<RoleSum> before, IReadOnlyList<RoleSum> after)
    {
        Dictionary<string, int> layers = after.ToDictionary(r => r.Role, r => r.Layers);
        return
        [
            .. before.Select(r => r with { Layers = r.Layers - layers.GetValueOrDefault(r.Role) }).Where(r => r.Layers > 0)
                .OrderByDescending(r => r.ColumnsTotal).ThenBy(r => r.Role, StringComparer.Ordinal),
        ];
    }

    private static bool IsInLayers(GraphValue value) => value.Name.StartsWith("layers.", StringComparison.Ordinal);

    private static List<RoleSum> ByRole(ParallelGraph graph, IEnumerable<GraphValue> values)
    {
        HashSet<string> logSumExp =
            [.. graph.Nodes.Where(n => n.Op == OpKind.Attention).Select(n => RoleOf(graph.Values[n.Outputs[1]].Name))];
        return
        [
            .. values.GroupBy(v => RoleOf(v.Name))
                .Select(g => new RoleSum(
                    g.Key, g.Count(), g.First().Columns, g.First().Packed is not null || logSumExp.Contains(g.Key)))
                .OrderByDescending(r => r.ColumnsTotal).ThenBy(r => r.Role, StringComparer.Ordinal),
        ];
    }
}
