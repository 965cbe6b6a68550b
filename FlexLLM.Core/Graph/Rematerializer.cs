using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>
/// Paper section 5.2, second half: what is cheap to compute again from values that are kept anyway is not kept itself. The
/// recipe runs in the backward pass just before its first reader, with the forward pass's own operations, so not a bit changes.
/// </summary>
internal static class Rematerializer
{
    // A recipe is at most a norm and a rotation: anything longer costs more time than its memory is worth.
    private const int RecipeLengthMax = 2;

    /// <summary>Takes a pruned graph; returns it with recipes in place of saved values, largest values first.</summary>
    public static ParallelGraph Rematerialize(ParallelGraph graph)
    {
        Dictionary<int, GraphNode> producers = [];
        foreach (GraphNode node in graph.Nodes.Where(n => !n.IsBackward))
        {
            foreach (int output in node.Outputs)
            {
                producers[output] = node;
            }
        }

        HashSet<int> kept = [.. SavedInLayers(graph)];
        Dictionary<int, List<GraphNode>> recipes = [];
        HashSet<int> sources = [];
        foreach (int value in kept.OrderByDescending(id => graph.Values[id].Columns).ThenBy(id => id).ToArray())
        {
            var recipe = new List<GraphNode>();
            if (!sources.Contains(value) && TryRecipe(value, recipe))
            {
                kept.Remove(value);
                recipes.Add(value, recipe);
                sources.UnionWith(recipe.SelectMany(n => n.Inputs).Where(kept.Contains));
            }
        }

        return GraphVerifier.Verify(Insert(graph, recipes));

        // Depth first, so that a recipe lists its operations in the order in which they run.
        bool TryRecipe(int value, List<GraphNode> recipe)
        {
            GraphNode node = producers[value];
            if (!IsCheap(node.Op) || recipe.Count >= RecipeLengthMax)
            {
                return false;
            }

            foreach (int input in node.Inputs)
            {
                bool available = !IsActivation(graph, input) || (kept.Contains(input) && input != value);
                if (node.Op == OpKind.Rope || !available)
                {
                    // A rotation works in place: on a copy that the recipe made, never on the kept value.
                    if (!producers.ContainsKey(input) || !TryRecipe(input, recipe))
                    {
                        return false;
                    }
                }
            }

            recipe.Add(node);
            return recipe.Count <= RecipeLengthMax;
        }
    }

    private static bool IsCheap(OpKind op) => op is OpKind.RmsNorm or OpKind.SiluGate or OpKind.Rope;

    private static bool IsActivation(ParallelGraph graph, int value) => graph.Values[value].Kind == ValueKind.Activation;

    // Keys and values stay in the KV cache in any case; the log-sum-exp has no cheap recipe.
    private static IEnumerable<int> SavedInLayers(ParallelGraph graph)
    {
        GraphNode[] backward = [.. graph.Nodes.Where(n => n.IsBackward && n.Layer >= 0)];
        HashSet<int> cached = [.. backward.Where(n => n.Op == OpKind.AttentionBackward).SelectMany(n => n.Inputs[2..4])];
        return backward.SelectMany(n => n.Inputs).Where(i => IsActivation(graph, i) && !cached.Contains(i)).Distinct();
    }

    private static ParallelGraph Insert(ParallelGraph graph, Dictionary<int, List<GraphNode>> recipes)
    {
        List<GraphValue> values = [.. graph.Values];
        var nodes = new List<GraphNode>(graph.Nodes.Count);

        // Within a layer a recipe runs once; readers in another layer (there are none today) would run their own.
        var made = new Dictionary<(int Layer, int Value), int>();
        foreach (GraphNode node in graph.Nodes)
        {
            if (!node.IsBackward || node.Layer < 0)
            {
                nodes.Add(node);
                continue;
            }

            int[] inputs = [.. node.Inputs];
            for (int i = 0; i < inputs.Length; i++)
            {
                if (recipes.TryGetValue(inputs[i], out List<GraphNode>? recipe))
                {
                    inputs[i] = Run(inputs[i], recipe, node.Layer);
                }
            }

            nodes.Add(node with { Inputs = inputs });
        }

        return new ParallelGraph(values, [.. nodes.Select((node, index) => node with { Id = index })]);

        int Run(int value, List<GraphNode> recipe, int layer)
        {
            if (made.TryGetValue((layer, value), out int known))
            {
                return known;
            }

            foreach (GraphNode step in recipe)
            {
                int output = step.Outputs[0];
                int copy = values.Count;
                values.Add(graph.Values[output] with { Id = copy, Name = $"{graph.Values[output].Name} again" });
                int[] inputs = [.. step.Inputs.Select(i => made.GetValueOrDefault((layer, i), i))];
                nodes.Add(step with { Inputs = inputs, Outputs = [copy], Layer = layer, Recomputes = true });
                made[(layer, output)] = copy;
            }

            Check.That(made.ContainsKey((layer, value)));
            return made[(layer, value)];
        }
    }
}
