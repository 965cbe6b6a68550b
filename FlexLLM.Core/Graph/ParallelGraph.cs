using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>What a value is to the planner.</summary>
internal enum ValueKind
{
    /// <summary>Computed per token row.</summary>
    Activation,

    /// <summary>A backbone weight: never trained.</summary>
    FrozenWeight,

    /// <summary>A bypass weight: what finetuning asks gradients for.</summary>
    TrainableWeight,

    /// <summary>Gradient of an activation, per token row.</summary>
    Gradient,

    /// <summary>Gradient of a weight.</summary>
    WeightGradient,
}

/// <summary>One value of the graph; every value has one producer (weights have none).</summary>
/// <param name="Id">Index in <see cref="ParallelGraph.Values"/>.</param>
/// <param name="Name">Stable across graphs of the same model: weights carry their checkpoint name.</param>
/// <param name="Kind">What it is.</param>
/// <param name="Columns">
/// Elements per token row; for weights their input width (the wide side of a bypass matrix).
/// </param>
/// <param name="Layer">Decoder layer, or -1 outside the layers.</param>
internal sealed record GraphValue(int Id, string Name, ValueKind Kind, int Columns, int Layer)
{
    /// <summary>Set where rows hold packed bits instead of floats; Columns then counts the 32-bit containers.</summary>
    public PackedFormat? Packed { get; init; }

    /// <summary>Each rank of a group has a share of the rows only (Columns are whole).</summary>
    public bool IsRowSplit { get; init; }

    public bool IsWeight => Kind is ValueKind.FrozenWeight or ValueKind.TrainableWeight;
}

/// <summary>One operation. Nodes are stored in an order in which every input precedes its use.</summary>
/// <param name="Id">Index in <see cref="ParallelGraph.Nodes"/>.</param>
/// <param name="Op">What it computes.</param>
/// <param name="Inputs">Value ids; the meaning of each place depends on the operation (see <see cref="OpSignatures"/>).</param>
/// <param name="Outputs">Value ids.</param>
/// <param name="Layer">Decoder layer, or -1.</param>
/// <param name="Site">For bypass operations, the adapter site: layer * sites per layer + module.</param>
internal sealed record GraphNode(int Id, OpKind Op, int[] Inputs, int[] Outputs, int Layer, int Site = -1)
{
    /// <summary>True for nodes of the backward pass.</summary>
    public bool IsBackward { get; init; }

    /// <summary>A forward operation that runs again in the backward pass instead of having its result saved.</summary>
    public bool Recomputes { get; init; }

    /// <summary>Which weight of the site's network the node reads or makes the gradient of; -1 for none.</summary>
    public int BypassWeight { get; init; } = -1;

    /// <summary>The result is multiplied by the adapter's scale.</summary>
    public bool Scaled { get; init; }

    /// <summary>For <see cref="OpKind.Bypass"/>: between which values the network stands.</summary>
    public BypassAttachment Attachment { get; init; }

    /// <summary>For <see cref="OpKind.Move"/>: what happens to the value.</summary>
    public MoveKind Move { get; init; }

    /// <summary>For a forward <see cref="OpKind.Move"/>: what happens to its gradient.</summary>
    public MoveKind GradientMove { get; init; }

    /// <summary>For <see cref="OpKind.AddBias"/>: a bias that enters a sum of partials once.</summary>
    public bool OnRankZeroOnly { get; init; }
}

/// <summary>An immutable computation graph: what passes read and return.</summary>
internal sealed class ParallelGraph(IReadOnlyList<GraphValue> values, IReadOnlyList<GraphNode> nodes)
{
    public IReadOnlyList<GraphValue> Values { get; } = values;

    public IReadOnlyList<GraphNode> Nodes { get; } = nodes;

    /// <summary>The same values with other nodes, renumbered.</summary>
    public ParallelGraph WithNodes(IEnumerable<GraphNode> nodes) => With(Values, nodes);

    /// <summary>Other values and nodes, renumbered.</summary>
    public static ParallelGraph With(IReadOnlyList<GraphValue> values, IEnumerable<GraphNode> nodes) =>
        new(values, [.. nodes.Select((node, index) => node with { Id = index })]);

    public bool IsActivation(int value) => Values[value].Kind == ValueKind.Activation;

    /// <summary>The forward node that makes each value; null for weights and for what the backward pass makes.</summary>
    public GraphNode?[] ForwardProducers()
    {
        var producers = new GraphNode?[Values.Count];
        foreach (GraphNode node in Nodes.Where(n => !n.IsBackward))
        {
            foreach (int output in node.Outputs)
            {
                producers[output] = node;
            }
        }

        return producers;
    }

    /// <summary>Keys and values of every layer: they stay in the KV cache in any case, for attention again and backward.</summary>
    public HashSet<int> CachedValues() =>
        [.. Nodes.Where(n => n.Op == OpKind.Attention && !n.IsBackward).SelectMany(n => n.Inputs[1..3])];
}
