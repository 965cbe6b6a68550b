using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>
/// Reverse-mode differentiation: appends the backward nodes of every forward node, also those that nobody will need
/// (gradients of frozen weights); <see cref="GraphPruner"/> removes them. The rules are the table <see cref="Rule"/>.
/// </summary>
internal static class Differentiator
{
    /// <summary>The forward graph followed by its backward nodes, from the loss to the embedding.</summary>
    public static ParallelGraph Differentiate(ParallelGraph forward)
    {
        GraphBuilder builder = new(forward) { IsBackward = true };
        var gradients = new Gradients(builder, forward.Values.Count);
        for (int index = forward.Nodes.Count - 1; index >= 0; index--)
        {
            GraphNode node = forward.Nodes[index];
            builder.Layer = node.Layer;
            Rule(node, builder, gradients);
        }

        return GraphVerifier.Verify(builder.Build());
    }

    /// <summary>One case an operation: which backward nodes it becomes, and which forward values those read.</summary>
    private static void Rule(GraphNode node, GraphBuilder graph, Gradients d)
    {
        int[] x = node.Inputs;
        int y = node.Outputs[0];
        if (node.Op == OpKind.CrossEntropy)
        {
            // The fused operation already computed the gradient of its input in the forward call.
            d.Add(x[0], node.Outputs[1]);
            return;
        }

        // A value that no loss depends on (logits for sampling) has no gradient to pass on, and what serves does not train.
        if (node.Op is OpKind.Logits or OpKind.Bypass || !d.Has(y))
        {
            return;
        }

        int dy = d[y];
        switch (node.Op)
        {
            case OpKind.Add:
                d.Add(x[0], dy);
                d.Add(x[1], dy);
                break;
            case OpKind.Linear:
                graph.Node(OpKind.LinearBackwardInput, [dy, x[1]], [d.Contribution(x[0])]);
                d.Commit(x[0]);
                graph.Node(OpKind.LinearBackwardWeight, [dy, x[0]], [d.OfWeight(x[1])]);
                break;
            case OpKind.RmsNorm:
                graph.Node(OpKind.RmsNormBackward, [dy, x[1], x[0]], [d.Contribution(x[0])]);
                d.Commit(x[0]);
                graph.Node(OpKind.RmsNormBackwardGain, [dy, x[0]], [d.OfWeight(x[1])]);
                break;
            case OpKind.Rope:
                graph.Node(OpKind.RopeBackward, [dy], [d.Contribution(x[0])]);
                d.Commit(x[0]);
                break;
            case OpKind.SiluGate:
                int dGate = d.Contribution(x[0]);
                int dUp = d.Contribution(x[1]);
                graph.Node(OpKind.SiluGateBackward, [dy, x[0], x[1]], [dGate, dUp]);
                d.Commit(x[0]);
                d.Commit(x[1]);
                break;
            case OpKind.Attention:
                int dq = d.Contribution(x[0]);
                int dk = d.Contribution(x[1]);
                int dv = d.Contribution(x[2]);
                graph.Node(OpKind.AttentionBackward, [dy, x[0], x[1], x[2], node.Outputs[1]], [dq, dk, dv]);
                d.Commit(x[0]);
                d.Commit(x[1]);
                d.Commit(x[2]);
                break;
            case OpKind.Narrow:
                graph.Node(node, OpKind.OuterProduct, [dy, x[0]], [d.OfWeight(x[1])]);
                graph.Node(node, OpKind.Widen, [dy, x[1]], [d.Contribution(x[0])]);
                d.Commit(x[0]);
                break;
            case OpKind.Widen:
                graph.Node(node, OpKind.OuterProduct, [x[0], dy], [d.OfWeight(x[1])]);
                graph.Node(node, OpKind.Narrow, [dy, x[1]], [d.Contribution(x[0])]);
                d.Commit(x[0]);
                break;
            case OpKind.AddBias:
                graph.Node(node, OpKind.AddBiasBackward, [dy], [d.OfWeight(x[1])]);
                d.Add(x[0], dy);
                break;
            case OpKind.Relu:
                graph.Node(OpKind.ReluBackward, [dy, y], [d.Contribution(x[0])]);
                d.Commit(x[0]);
                break;
            case OpKind.Silu:
                graph.Node(OpKind.SiluBackward, [dy, x[0]], [d.Contribution(x[0])]);
                d.Commit(x[0]);
                break;
            case OpKind.ScaleColumns:
                int dGain = d.OfWeight(x[1]);
                graph.Node(node, OpKind.ScaleColumnsBackward, [dy, x[0], x[1]], [dGain, d.Contribution(x[0])]);
                d.Commit(x[0]);
                break;
            case OpKind.Move when node.GradientMove == MoveKind.Pass:
                d.Add(x[0], dy);
                break;
            case OpKind.Move:
                graph.Move(node.GradientMove, node.Site, dy, d.Contribution(x[0]));
                d.Commit(x[0]);
                break;
            case OpKind.Embed:
                graph.Node(OpKind.EmbedBackward, [dy], [d.OfWeight(x[0])]);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(node), node.Op, "Add a gradient rule for this operation.");
        }
    }

    /// <summary>The gradient of each value so far; a second contribution is summed by an AddGradient node.</summary>
    private sealed class Gradients(GraphBuilder graph, int forwardValues)
    {
        private const int None = -1;
        private readonly int[] _gradient = Filled(forwardValues);
        private readonly int[] _pending = Filled(forwardValues);

        public int this[int value] => _gradient[value];

        public bool Has(int value) => _gradient[value] != None;

        /// <summary>A fresh value for one contribution to the gradient of <paramref name="value"/>; Commit adds it.</summary>
        public int Contribution(int value)
        {
            Check.That(_pending[value] == None);
            string suffix = Has(value) ? "+" : string.Empty;
            _pending[value] = Gradient(value, suffix);
            return _pending[value];
        }

        public void Commit(int value)
        {
            Add(value, _pending[value]);
            _pending[value] = None;
        }

        public void Add(int value, int contribution)
        {
            if (!Has(value))
            {
                _gradient[value] = contribution;
                return;
            }

            int sum = Gradient(value, string.Empty);
            graph.Node(OpKind.AddGradient, [_gradient[value], contribution], [sum]);
            _gradient[value] = sum;
        }

        public int OfWeight(int weight) =>
            graph.Value($"d {graph[weight].Name}", ValueKind.WeightGradient, graph[weight].Columns);

        private int Gradient(int value, string suffix) => graph.Value(
            $"d {graph[value].Name}{suffix}", ValueKind.Gradient, graph[value].Columns, graph[value].IsRowSplit);

        private static int[] Filled(int length)
        {
            int[] array = new int[length];
            Array.Fill(array, None);
            return array;
        }
    }
}
