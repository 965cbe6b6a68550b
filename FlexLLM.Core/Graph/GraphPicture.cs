using System.Globalization;
using System.Text;

namespace FlexLLM.Graph;

/// <summary>
/// Draws the nodes of one layer as Graphviz DOT: forward boxes on white, backward boxes on grey, what is computed again dashed;
/// an edge is a value, bold where the value is kept for the backward pass. Weights are left out.
/// </summary>
internal static class GraphPicture
{
    public static string Dot(ParallelGraph graph, int layer)
    {
        HashSet<int> kept = [.. GraphPruner.SavedSet(graph).Select(v => v.Id)];
        GraphNode[] nodes = [.. graph.Nodes.Where(n => n.Layer == layer)];
        var producers = new Dictionary<int, GraphNode>();
        var text = new StringBuilder();
        text.Append("digraph layer {\n  rankdir=TB;\n  node [shape=box, style=filled, fontname=\"Helvetica\", fillcolor=white];\n");
        foreach (GraphNode node in nodes)
        {
            string style = node.Recomputes ? "\"filled,dashed\"" : "filled";
            string color = node.Recomputes ? "lightyellow" : node.IsBackward ? "gray90" : "white";
            text.Append(CultureInfo.InvariantCulture, $"  n{node.Id} [label=\"{node.Op}\", style={style}, fillcolor={color}];\n");
            foreach (int output in node.Outputs)
            {
                producers[output] = node;
            }
        }

        HashSet<int> outside = [];
        foreach (GraphNode node in nodes)
        {
            foreach (int input in node.Inputs.Where(i => !graph.Values[i].IsWeight))
            {
                GraphValue value = graph.Values[input];
                string from = producers.TryGetValue(input, out GraphNode? producer) ? $"n{producer.Id}" : $"v{input}";
                if (producer is null && outside.Add(input))
                {
                    text.Append(CultureInfo.InvariantCulture, $"  v{input} [label=\"{value.Name}\", shape=plaintext, style=\"\"];\n");
                }

                string bold = kept.Contains(input) && node.IsBackward ? ", penwidth=3, color=red" : string.Empty;
                text.Append(CultureInfo.InvariantCulture,
                    $"  {from} -> n{node.Id} [label=\"{PassReport.RoleOf(value.Name)} {value.Columns}\"{bold}];\n");
            }
        }

        return text.Append("}\n").ToString();
    }
}
