namespace FlexLLM.Graph;

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

    /// <summary>Whether the nodes added from now on belong to the backward pass.</summary>
    public bool IsBackward { get; set; }

    /// <summary>Nodes so far.</summary>
    public int Count => _nodes.Count;

    public GraphValue this[int id] => _values[id];

    public int Weight(string name, int columns, bool trainable = false) =>
        Value(name, trainable ? ValueKind.TrainableWeight : ValueKind.FrozenWeight, columns);

    public int Value(string name, ValueKind kind, int columns, bool isRowSplit = false)
    {
        _values.Add(new GraphValue(_values.Count, name, kind, columns, Layer) { IsRowSplit = isRowSplit });
        return _values.Count - 1;
    }

    /// <summary>Appends a move; its gradient, where one is asked for, is another one.</summary>
    public void Move(MoveKind move, int site, int from, int to, MoveKind gradient = MoveKind.Pass) =>
        _nodes.Add(new GraphNode(_nodes.Count, OpKind.Move, [from], [to], Layer, site)
        {
            IsBackward = IsBackward,
            Move = move,
            GradientMove = gradient,
        });

    /// <summary>Appends a node like another one (its site and weight), with other operation, inputs and outputs.</summary>
    public void Node(GraphNode like, OpKind op, int[] inputs, int[] outputs) =>
        _nodes.Add(like with { Id = _nodes.Count, Op = op, Inputs = inputs, Outputs = outputs, Layer = Layer, IsBackward = IsBackward });

    public void Node(OpKind op, int[] inputs, int[] outputs, int site = -1) =>
        _nodes.Add(new GraphNode(_nodes.Count, op, inputs, outputs, Layer, site) { IsBackward = IsBackward });

    /// <summary>Appends an operation with one activation as its result.</summary>
    public int Activation(OpKind op, string name, int columns, params int[] inputs)
    {
        int result = Value(name, ValueKind.Activation, columns);
        Node(op, inputs, [result]);
        return result;
    }

    public ParallelGraph Build() => new(_values, _nodes);
}
