using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>What a node computes. Forward operations first, each followed by what differentiation makes of it.</summary>
internal enum OpKind
{
    /// <summary>x[row] = table[id of row].</summary>
    Embed,

    /// <summary>Gradient of the embedding table; pruned whenever the table is frozen.</summary>
    EmbedBackward,

    /// <summary>Root-mean-square norm with a gain, over groups of the gain's width.</summary>
    RmsNorm,

    /// <summary>Gradient of the norm's input; reads the forward input.</summary>
    RmsNormBackward,

    /// <summary>Gradient of the norm's gain; pruned whenever the gain is frozen.</summary>
    RmsNormBackwardGain,

    /// <summary>y = x W^T (+ bias).</summary>
    Linear,

    /// <summary>dx = dy W; reads no activation.</summary>
    LinearBackwardInput,

    /// <summary>dW = dy^T x; pruned whenever W is frozen.</summary>
    LinearBackwardWeight,

    /// <summary>A LoRA bypass network: f = scale * (x A^T) B^T.</summary>
    Lora,

    /// <summary>Gradients of A, B and x of a LoRA bypass; reads x, recomputes x A^T.</summary>
    LoraBackward,

    /// <summary>Rotary position embedding.</summary>
    Rope,

    /// <summary>The inverse rotation.</summary>
    RopeBackward,

    /// <summary>Causal attention; outputs the heads and the log-sum-exp of each row's scores.</summary>
    Attention,

    /// <summary>Gradients of queries, keys and values; reads q, k, v and the log-sum-exp.</summary>
    AttentionBackward,

    /// <summary>silu(gate) * up.</summary>
    SiluGate,

    /// <summary>Gradients of gate and up; reads both.</summary>
    SiluGateBackward,

    /// <summary>y = a + b; its gradient passes through unchanged.</summary>
    Add,

    /// <summary>Sum of two contributions to one gradient.</summary>
    AddGradient,

    /// <summary>Vocabulary logits of chosen rows, for sampling.</summary>
    Logits,

    /// <summary>Loss of rows with a target, and the gradient of its input at once.</summary>
    CrossEntropy,
}

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
/// <param name="Columns">Elements per token row; for weights their input width.</param>
/// <param name="Layer">Decoder layer, or -1 outside the layers.</param>
internal sealed record GraphValue(int Id, string Name, ValueKind Kind, int Columns, int Layer);

/// <summary>One operation. Nodes are stored in an order in which every input precedes its use.</summary>
/// <param name="Id">Index in <see cref="ParallelGraph.Nodes"/>.</param>
/// <param name="Op">What it computes.</param>
/// <param name="Inputs">Value ids; the meaning of each place depends on the operation (see <see cref="OpSignatures"/>).</param>
/// <param name="Outputs">Value ids.</param>
/// <param name="Layer">Decoder layer, or -1.</param>
/// <param name="Site">For bypass operations, the adapter site: layer * sites per layer + module.</param>
internal sealed record GraphNode(int Id, OpKind Op, int[] Inputs, int[] Outputs, int Layer, int Site = -1)
{
    /// <summary>A forward operation that runs again in the backward pass instead of having its result saved.</summary>
    public bool Recomputes { get; init; }

    /// <summary>True for nodes of the backward pass.</summary>
    public bool IsBackward => Recomputes || Op is
        OpKind.EmbedBackward or OpKind.RmsNormBackward or OpKind.RmsNormBackwardGain or OpKind.LinearBackwardInput or
        OpKind.LinearBackwardWeight or OpKind.LoraBackward or OpKind.RopeBackward or OpKind.AttentionBackward or
        OpKind.SiluGateBackward or OpKind.AddGradient;
}

/// <summary>An immutable computation graph: what passes read and return.</summary>
internal sealed class ParallelGraph(IReadOnlyList<GraphValue> values, IReadOnlyList<GraphNode> nodes)
{
    public IReadOnlyList<GraphValue> Values { get; } = values;

    public IReadOnlyList<GraphNode> Nodes { get; } = nodes;

    /// <summary>The same values with other nodes, renumbered.</summary>
    public ParallelGraph WithNodes(IEnumerable<GraphNode> nodes) =>
        new(Values, [.. nodes.Select((node, index) => node with { Id = index })]);
}

/// <summary>Builds a graph node by node; each call appends one operation and returns the value it makes.</summary>
internal sealed class GraphBuilder
{
    private readonly List<GraphValue> _values;
    private readonly List<GraphNode> _nodes;

    public GraphBuilder()
    {
        _values = [];
        _nodes = [];
    }

    /// <summary>Continues from an existing graph (differentiation appends to the forward graph).</summary>
    public GraphBuilder(ParallelGraph graph)
    {
        _values = [.. graph.Values];
        _nodes = [.. graph.Nodes];
    }

    /// <summary>Decoder layer of the nodes added from now on; -1 outside the layers.</summary>
    public int Layer { get; set; } = -1;

    public GraphValue this[int id] => _values[id];

    public int Weight(string name, int columns, bool trainable = false) =>
        Value(name, trainable ? ValueKind.TrainableWeight : ValueKind.FrozenWeight, columns);

    public int Value(string name, ValueKind kind, int columns)
    {
        _values.Add(new GraphValue(_values.Count, name, kind, columns, Layer));
        return _values.Count - 1;
    }

    public void Node(OpKind op, int[] inputs, int[] outputs, int site = -1) =>
        _nodes.Add(new GraphNode(_nodes.Count, op, inputs, outputs, Layer, site));

    /// <summary>Appends an operation with one activation as its result.</summary>
    public int Activation(OpKind op, string name, int columns, params int[] inputs)
    {
        int result = Value(name, ValueKind.Activation, columns);
        Node(op, inputs, [result]);
        return result;
    }

    public ParallelGraph Build() => new(_values, _nodes);
}

/// <summary>
/// Places of inputs and outputs by operation: the contract between builder, rules and lowering. Optional trailing weights
/// (a bias) may be absent.
/// </summary>
internal static class OpSignatures
{
    /// <summary>Least number of inputs, greatest number of inputs, number of outputs.</summary>
    public static (int InputsMin, int InputsMax, int Outputs) Of(OpKind op) => op switch
    {
        OpKind.Embed => (1, 1, 1),                  // table -> x
        OpKind.EmbedBackward => (1, 1, 1),          // dx -> dTable
        OpKind.RmsNorm => (2, 2, 1),                // x, gain -> y
        OpKind.RmsNormBackward => (3, 3, 1),        // dy, gain, x -> dx
        OpKind.RmsNormBackwardGain => (2, 2, 1),    // dy, x -> dGain
        OpKind.Linear => (2, 3, 1),                 // x, W, bias? -> y
        OpKind.LinearBackwardInput => (2, 2, 1),    // dy, W -> dx
        OpKind.LinearBackwardWeight => (2, 2, 1),   // dy, x -> dW
        OpKind.Lora => (3, 3, 1),                   // x, A, B -> f
        OpKind.LoraBackward => (4, 4, 3),           // dy, x, A, B -> dA, dB, dx
        OpKind.Rope or OpKind.RopeBackward => (1, 1, 1),
        OpKind.Attention => (3, 3, 2),              // q, k, v -> heads, lse
        OpKind.AttentionBackward => (5, 5, 3),      // dHeads, q, k, v, lse -> dq, dk, dv
        OpKind.SiluGate => (2, 2, 1),               // gate, up -> y
        OpKind.SiluGateBackward => (3, 3, 2),       // dy, gate, up -> dGate, dUp
        OpKind.Add or OpKind.AddGradient => (2, 2, 1),
        OpKind.Logits => (2, 2, 1),                 // x, head -> logits
        OpKind.CrossEntropy => (2, 2, 2),           // x, head -> loss, dx
        _ => throw new ArgumentOutOfRangeException(nameof(op), op, "Add a signature for this operation."),
    };
}

/// <summary>Checks what every pass relies on; run after each of them.</summary>
internal static class GraphVerifier
{
    /// <summary>
    /// One producer a value, inputs before uses, arity as in <see cref="OpSignatures"/>, equal widths where required.
    /// </summary>
    public static ParallelGraph Verify(ParallelGraph graph)
    {
        bool[] defined = new bool[graph.Values.Count];
        foreach (GraphValue value in graph.Values)
        {
            defined[value.Id] = value.Kind is ValueKind.FrozenWeight or ValueKind.TrainableWeight;
            Check.That(value.Columns > 0);
        }

        foreach (GraphNode node in graph.Nodes)
        {
            (int least, int most, int outputs) = OpSignatures.Of(node.Op);
            Check.That(node.Inputs.Length >= least && node.Inputs.Length <= most && node.Outputs.Length == outputs);
            foreach (int input in node.Inputs)
            {
                Check.That(defined[input], $"{graph.Values[input].Name} is computed before {node.Op} of layer {node.Layer} reads it");
            }

            foreach (int output in node.Outputs)
            {
                Check.That(!defined[output], $"{graph.Values[output].Name} has one producer");
                defined[output] = true;
            }

            if (node.Op is OpKind.Add or OpKind.AddGradient or OpKind.SiluGate)
            {
                Check.That(graph.Values[node.Inputs[0]].Columns == graph.Values[node.Inputs[1]].Columns);
                Check.That(graph.Values[node.Inputs[0]].Columns == graph.Values[node.Outputs[0]].Columns);
            }
        }

        return graph;
    }
}
