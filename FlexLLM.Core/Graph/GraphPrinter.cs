using System.Text;

namespace FlexLLM.Graph;

/// <summary>Prints a graph one node a line, in a form that people review: golden tests compare it.</summary>
internal static class GraphPrinter
{
    public static string Print(ParallelGraph graph)
    {
        var text = new StringBuilder();
        foreach (GraphNode node in graph.Nodes)
        {
            text.Append(Names(graph, node.Outputs)).Append(" = ").Append(node.Op).Append('(')
                .Append(Names(graph, node.Inputs)).Append(")\n");
        }

        return text.ToString();
    }

    private static string Names(ParallelGraph graph, int[] ids) => string.Join(", ", ids.Select(id => graph.Values[id].Name));
}
