using System.Globalization;
using System.Text;

namespace FlexLLM.Graph;

/// <summary>
/// Draws one layer as Graphviz DOT. Boxes are operations, forward and backward each in a frame, yellow and dashed where a forward
/// operation runs again; edges are values, with their elements per token. A value that is kept for the backward pass is a
/// cylinder between the two frames: red where it is saved, blue in the KV cache. Weights are left out.
/// </summary>
internal sealed class GraphPicture
{
    private readonly ParallelGraph _graph;
    private readonly int _layer;
    private readonly GraphNode[] _nodes;
    private readonly HashSet<int> _kept;
    private readonly HashSet<int> _cached;
    private readonly Dictionary<int, GraphNode> _producers = [];
    private readonly StringBuilder _text = new();

    private GraphPicture(ParallelGraph graph, int layer)
    {
        (_graph, _layer) = (graph, layer);
        _nodes = [.. graph.Nodes.Where(n => n.Layer == layer)];
        _cached = graph.CachedValues();
        HashSet<int> read = [.. _nodes.Where(n => n.IsBackward).SelectMany(n => n.Inputs)];
        _kept = [.. GraphPruner.SavedSet(graph).Select(v => v.Id).Where(read.Contains)];
        foreach (GraphNode node in _nodes)
        {
            foreach (int output in node.Outputs)
            {
                _producers[output] = node;
            }
        }
    }

    /// <summary>The picture of a layer of a graph after any pass.</summary>
    public static string Dot(ParallelGraph graph, int layer) => new GraphPicture(graph, layer).Draw();

    private string Draw()
    {
        Line($"digraph layer_{_layer} {{");
        Line("  rankdir=TB;");
        Line("  node [shape=box, style=filled, fillcolor=white, fontname=\"Helvetica\"];");
        Line("  edge [fontname=\"Helvetica\", fontsize=10];");
        DrawFrame("forward", _nodes.Where(n => !n.IsBackward), "white");
        DrawFrame("backward", _nodes.Where(n => n.IsBackward), "gray90");
        foreach (int value in _kept.Order())
        {
            string color = _cached.Contains(value) ? "lightblue" : "lightpink";
            Line($"  k{value} [shape=cylinder, fillcolor={color}, label=\"{Name(value)}\\n{Width(value)} kept\"];");
            if (_producers.TryGetValue(value, out GraphNode? producer))
            {
                Line($"  n{producer.Id} -> k{value} [color=red];");
            }
        }

        DrawOutside();
        foreach (GraphNode node in _nodes)
        {
            foreach (int input in node.Inputs.Where(i => !_graph.Values[i].IsWeight))
            {
                bool isKept = _kept.Contains(input) && (node.IsBackward || !_producers.ContainsKey(input));
                Line(isKept
                    ? $"  k{input} -> n{node.Id} [color=red];"
                    : $"  {Source(input)} -> n{node.Id} [label=\"{Width(input)}\"];");
            }
        }

        Line("}");
        return _text.ToString();
    }

    private void DrawFrame(string label, IEnumerable<GraphNode> nodes, string color)
    {
        Line($"  subgraph cluster_{label} {{");
        Line($"    label=\"{label}\";");
        foreach (GraphNode node in nodes)
        {
            string look = node.Recomputes ? ", style=\"filled,dashed\", fillcolor=lightyellow" : $", fillcolor={color}";
            Line($"    n{node.Id} [label=\"{node.Op}\\n{Name(node.Outputs[0])}\"{look}];");
        }

        Line("  }");
    }

    // What comes from other layers and what goes to them.
    private void DrawOutside()
    {
        IEnumerable<int> read = _nodes.SelectMany(n => n.Inputs)
            .Where(i => !_graph.Values[i].IsWeight && !_kept.Contains(i) && !_producers.ContainsKey(i));
        HashSet<int> own = [.. _nodes.Select(n => n.Id)];
        int[] left = [.. _graph.Nodes.Where(n => !own.Contains(n.Id)).SelectMany(n => n.Inputs).Where(_producers.ContainsKey).Distinct()];
        foreach (int value in read.Concat(left).Distinct().Order())
        {
            Line($"  v{value} [shape=plaintext, style=\"\", label=\"{Name(value)}\"];");
        }

        foreach (int value in left.Order())
        {
            Line($"  n{_producers[value].Id} -> v{value} [label=\"{Width(value)}\"];");
        }
    }

    private string Source(int value) => _producers.TryGetValue(value, out GraphNode? producer) ? $"n{producer.Id}" : $"v{value}";

    private string Width(int value)
    {
        GraphValue v = _graph.Values[value];
        return v.Packed is null ? Invariant($"{v.Columns}") : Invariant($"{v.Columns} x 32 bits");
    }

    // Within the picture the layer need not be said.
    private string Name(int value) => _graph.Values[value].Name.Replace($"layers.{_layer}.", "", StringComparison.Ordinal)
        .Replace("\\", "\\\\", StringComparison.Ordinal).Replace("\"", "\\\"", StringComparison.Ordinal);

    private void Line(string line) => _text.Append(line).Append('\n');

    private static string Invariant(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);
}
