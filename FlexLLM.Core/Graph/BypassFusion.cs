using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>
/// Puts one node in place of the operations of a LoRA network, which backends compute in one call: the forward pass of many
/// adapters at once, the backward pass without u = x A^T ever leaving scratch memory. Other networks run operation by operation.
/// </summary>
internal static class BypassFusion
{
    /// <summary>Fuses the backward half of a graph. Networks that do not have LoRA's form stay as they are.</summary>
    public static ParallelGraph Fuse(ParallelGraph graph)
    {
        List<GraphValue> values = [.. graph.Values];
        var replaced = new Dictionary<int, GraphNode?>();
        ILookup<int, GraphNode> bySite = graph.Nodes.Where(n => n.IsBackward && n.Site >= 0).ToLookup(n => n.Site);
        if (bySite.Count == 0)
        {
            return graph;
        }

        Dictionary<int, GraphNode> adds = graph.Nodes.Where(n => n.Recomputes && n.Op == OpKind.Add)
            .GroupBy(n => n.Inputs[1]).ToDictionary(g => g.Key, g => g.First());
        foreach (IGrouping<int, GraphNode> site in bySite)
        {
            FuseForward(site, adds, replaced);
            FuseBackward(site, values, replaced);
        }

        List<GraphNode> nodes = [.. graph.Nodes.Select(n => replaced.GetValueOrDefault(n.Id, n)).OfType<GraphNode>()];

        // u was computed again for the nodes that are gone.
        HashSet<int> read = [.. nodes.SelectMany(n => n.Inputs)];
        nodes.RemoveAll(n => n.Recomputes && n.Op == OpKind.Narrow && !read.Contains(n.Outputs[0]));
        return GraphVerifier.Verify(ParallelGraph.With(values, nodes));
    }

    // base + Widen(Narrow(x, A), B), computed again: the sum's bits depend on being one operation exactly where the forward pass
    // has one, which is where ranks need not talk inside the network.
    private static void FuseForward(
        IGrouping<int, GraphNode> site, Dictionary<int, GraphNode> adds, Dictionary<int, GraphNode?> replaced)
    {
        GraphNode? narrow = site.FirstOrDefault(n => n.Op == OpKind.Narrow && n.Recomputes && n.BypassWeight == 0);
        GraphNode? widen = site.FirstOrDefault(n => n.Op == OpKind.Widen && n.Recomputes && n.BypassWeight == 1);
        if (narrow is null || widen is null || widen.Inputs[0] != narrow.Outputs[0] ||
            !adds.TryGetValue(widen.Outputs[0], out GraphNode? add) ||
            site.Any(n => n is { Recomputes: true, Op: OpKind.Move, Move: not MoveKind.Pass }))
        {
            return;
        }

        replaced[widen.Id] = null;
        replaced[add.Id] = widen with
        {
            Op = OpKind.Lora,
            Inputs = [narrow.Inputs[0], narrow.Inputs[1], widen.Inputs[1], add.Inputs[0]],
            Outputs = add.Outputs,
            BypassWeight = -1,
        };
    }

    private static void FuseBackward(
        IGrouping<int, GraphNode> site, List<GraphValue> values, Dictionary<int, GraphNode?> replaced)
    {
        GraphNode[] own = [.. site.Where(n => !n.Recomputes)];
        GraphNode? gradA = own.FirstOrDefault(n => n.Op == OpKind.OuterProduct && n.BypassWeight == 0);
        GraphNode? gradB = own.FirstOrDefault(n => n.Op == OpKind.OuterProduct && n.BypassWeight == 1);
        GraphNode? narrow = own.FirstOrDefault(n => n.Op == OpKind.Narrow && n.BypassWeight == 1);
        GraphNode? widen = own.FirstOrDefault(n => n.Op == OpKind.Widen && n.BypassWeight == 0);
        GraphNode? u = site.FirstOrDefault(n => n.Recomputes && n.Op == OpKind.Narrow && n.BypassWeight == 0);
        int expected = widen is null ? 3 : 4;
        if (gradA is null || gradB is null || narrow is null || u is null || own.Length != expected ||
            gradB.Inputs[0] != u.Outputs[0] || gradA.Inputs[0] != narrow.Outputs[0] || gradA.Inputs[1] != u.Inputs[0])
        {
            return;
        }

        int dx = widen?.Outputs[0] ?? values.Count;
        if (widen is null)
        {
            GraphValue x = values[u.Inputs[0]];
            values.Add(new GraphValue(dx, $"d {x.Name}+", ValueKind.Gradient, x.Columns, x.Layer));
        }

        // One after another as differentiation made them, so that what they read is alive at the last of them.
        foreach (GraphNode node in own)
        {
            replaced[node.Id] = null;
        }

        GraphNode last = own[^1];
        Check.That(last.Id - own[0].Id == own.Length - 1);
        replaced[last.Id] = last with
        {
            Op = OpKind.LoraBackward,
            Inputs = [gradB.Inputs[1], u.Inputs[0], u.Inputs[1], narrow.Inputs[1]],
            Outputs = [gradA.Outputs[0], gradB.Outputs[0], dx],
            BypassWeight = -1,
        };
    }
}
