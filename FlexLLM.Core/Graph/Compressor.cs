using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>
/// Paper section 5.2, last step: keeps in fewer bytes what stays saved. Without loss where a ReLU's gradient is all that reads its
/// output: a bit an element. With loss, only where asked for by name: bfloat16 for every other saved value.
/// </summary>
internal static class Compressor
{
    /// <summary>
    /// Takes a pruned (and rematerialized) graph; puts a pack after the saved values and an unpack before their first reader.
    /// </summary>
    public static ParallelGraph Compress(ParallelGraph graph, bool storeAsBF16)
    {
        HashSet<int> cached = graph.CachedValues();
        HashSet<int> logSumExp = [.. graph.Nodes.Where(n => n.Op == OpKind.AttentionBackward).Select(n => n.Inputs[4])];
        Dictionary<int, PackedFormat> formats = [];
        ILookup<int, GraphNode> readers = graph.Nodes.Where(n => n.IsBackward && n.Layer >= 0)
            .SelectMany(n => n.Inputs.Select(i => (Input: i, Node: n))).ToLookup(r => r.Input, r => r.Node);
        foreach (GraphValue value in GraphPruner.SavedSet(graph).Where(v => v.Layer >= 0 && readers.Contains(v.Id)))
        {
            if (cached.Contains(value.Id) || logSumExp.Contains(value.Id))
            {
                continue;
            }

            if (readers[value.Id].All(n => n.Op == OpKind.ReluBackward && n.Inputs[1] == value.Id))
            {
                formats.Add(value.Id, PackedFormat.SignBits);
            }
            else if (storeAsBF16)
            {
                formats.Add(value.Id, PackedFormat.BF16);
            }
        }

        return formats.Count == 0 ? graph : GraphVerifier.Verify(Rewrite(graph, formats));
    }

    private static ParallelGraph Rewrite(ParallelGraph graph, Dictionary<int, PackedFormat> formats)
    {
        List<GraphValue> values = [.. graph.Values];
        var nodes = new List<GraphNode>(graph.Nodes.Count);
        var packed = new Dictionary<int, int>();
        var unpacked = new Dictionary<int, int>();
        foreach (GraphNode node in graph.Nodes)
        {
            if (!node.IsBackward)
            {
                nodes.Add(node);
                foreach (int output in node.Outputs.Where(formats.ContainsKey))
                {
                    GraphValue value = graph.Values[output];
                    int columns = PackedFormats.PackedColumns(value.Columns, formats[output]);
                    packed[output] = New(value with { Name = $"{value.Name} packed", Columns = columns, Packed = formats[output] });
                    nodes.Add(new GraphNode(0, OpKind.Pack, [output], [packed[output]], value.Layer));
                }

                continue;
            }

            nodes.Add(node.Layer < 0 ? node : node with { Inputs = [.. node.Inputs.Select(i => Unpacked(i, node.Layer))] });
        }

        return ParallelGraph.With(values, nodes);

        int Unpacked(int input, int layer)
        {
            if (!formats.ContainsKey(input))
            {
                return input;
            }

            if (!unpacked.TryGetValue(input, out int value))
            {
                value = unpacked[input] = New(graph.Values[input] with { Name = $"{graph.Values[input].Name} unpacked" });
                nodes.Add(new GraphNode(0, OpKind.Unpack, [packed[input]], [value], layer) { IsBackward = true, Recomputes = true });
            }

            return value;
        }

        int New(GraphValue value)
        {
            values.Add(value with { Id = values.Count });
            return values.Count - 1;
        }
    }
}
