using FlexLLM.Graph;

namespace FlexLLM.Models;

/// <summary>
/// A backbone weight, named as in the checkpoint: a matrix [Rows, Columns], or a vector of Columns (Rows is 1).
/// </summary>
internal readonly record struct WeightShape(string Name, int Rows, int Columns, bool IsVector)
{
    public long Count => (long)Rows * Columns;

    /// <summary>The shape as a checkpoint states it.</summary>
    public long[] Dimensions => IsVector ? [Columns] : [Rows, Columns];
}

/// <summary>What every weight of a model looks like, read off the nodes of its graph that use it.</summary>
internal static class DecoderWeights
{
    /// <summary>Each backbone weight once, in the order of first use.</summary>
    public static IReadOnlyList<WeightShape> Of(ModelConfig config)
    {
        ParallelGraph graph = DecoderBuilder.BuildTraining(config, new Dictionary<int, BypassNetwork>());
        var seen = new HashSet<int>();
        var shapes = new List<WeightShape>();
        foreach (GraphNode node in graph.Nodes)
        {
            for (int place = 0; place < node.Inputs.Length; place++)
            {
                GraphValue value = graph.Values[node.Inputs[place]];
                if (value.Kind == ValueKind.FrozenWeight && seen.Add(value.Id))
                {
                    bool isVector = node.Op == OpKind.RmsNorm || (node.Op == OpKind.Linear && place == 2);
                    int rows = node.Op == OpKind.Embed ? config.VocabularySize : graph.Values[node.Outputs[0]].Columns;
                    shapes.Add(new WeightShape(value.Name, isVector ? 1 : rows, value.Columns, isVector));
                }
            }
        }

        return shapes;
    }
}
