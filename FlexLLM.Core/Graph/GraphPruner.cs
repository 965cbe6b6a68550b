namespace FlexLLM.Graph;

/// <summary>
/// Paper section 5.2: keeps only the backward nodes on which the gradient of a trainable weight depends. Gradients of frozen
/// weights go, and with them everything below the lowest bypass. What forward values then remain read is the saved set.
/// </summary>
internal static class GraphPruner
{
    /// <summary>The graph without useless backward nodes. Forward nodes stay: inference needs them all.</summary>
    /// <param name="graph">A differentiated graph.</param>
    /// <param name="alsoWanted">Gradients of other values that somebody reads, by name.</param>
    public static ParallelGraph Prune(ParallelGraph graph, params string[] alsoWanted)
    {
        bool[] needed = new bool[graph.Values.Count];
        HashSet<string> wanted =
            [.. alsoWanted, .. graph.Values.Where(v => v.Kind == ValueKind.TrainableWeight).Select(v => $"d {v.Name}")];
        var kept = new List<GraphNode>(graph.Nodes.Count);
        for (int index = graph.Nodes.Count - 1; index >= 0; index--)
        {
            GraphNode node = graph.Nodes[index];
            bool keep = !node.IsBackward || node.Outputs.Any(o => needed[o] || wanted.Contains(graph.Values[o].Name));
            if (!keep)
            {
                continue;
            }

            kept.Add(node);
            foreach (int input in node.Inputs)
            {
                needed[input] |= node.IsBackward;
            }
        }

        kept.Reverse();
        return GraphVerifier.Verify(graph.WithNodes(kept));
    }

    /// <summary>
    /// Forward activations that a backward node reads, in graph order: the values to keep from forward to backward.
    /// </summary>
    public static IReadOnlyList<GraphValue> SavedSet(ParallelGraph graph)
    {
        var saved = new SortedSet<int>();
        foreach (GraphNode node in graph.Nodes.Where(n => n.IsBackward))
        {
            saved.UnionWith(node.Inputs.Where(i => graph.Values[i].Kind == ValueKind.Activation));
        }

        saved.ExceptWith(graph.Nodes.Where(n => n.Recomputes).SelectMany(n => n.Outputs));

        return [.. saved.Select(id => graph.Values[id])];
    }
}
