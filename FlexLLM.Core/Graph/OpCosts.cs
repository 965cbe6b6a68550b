namespace FlexLLM.Graph;

/// <summary>Arithmetic of operations per token row: what recomputation is weighed by, and weighed against.</summary>
internal static class OpCosts
{
    // An exponential, a division: more than this per element no elementwise operation or norm takes.
    private const int FlopsPerElement = 8;

    /// <summary>
    /// Is the operation cheap enough to run again without being forced to: elementwise, a norm, a rotation, or a product with a
    /// bypass matrix? The linears of the backbone and attention are not.
    /// </summary>
    public static bool IsCheap(OpKind op) => op is
        OpKind.RmsNorm or OpKind.SiluGate or OpKind.Rope or OpKind.Add or OpKind.Narrow or OpKind.Widen or OpKind.AddBias or
        OpKind.Relu or OpKind.Silu or OpKind.ScaleColumns or OpKind.Move;

    /// <summary>May the operation run again at all? It must read rows of its own window, weights and the KV cache alone.</summary>
    public static bool CanRecompute(OpKind op) => IsCheap(op) || op is OpKind.Linear or OpKind.Attention;

    /// <summary>
    /// Flops of one row; attention as of the middle of a sequence of the given length. Not of the head, whose width no value of
    /// the graph tells, and not of fused operations: ask before <see cref="BypassFusion"/>.
    /// </summary>
    public static double FlopsOf(ParallelGraph graph, GraphNode node, int sequenceTokens)
    {
        double columns = graph.Values[node.Outputs[0]].Columns;
        return node.Op switch
        {
            OpKind.Linear or OpKind.LinearBackwardInput or OpKind.Narrow or OpKind.Widen =>
                2 * columns * graph.Values[node.Inputs[0]].Columns,
            OpKind.LinearBackwardWeight or OpKind.OuterProduct =>
                2.0 * graph.Values[node.Inputs[0]].Columns * graph.Values[node.Inputs[1]].Columns,

            // Forward: scores, and their product with the values. Backward: scores again, and four products with their gradient.
            OpKind.Attention => 4 * columns * (sequenceTokens / 2.0),
            OpKind.AttentionBackward => 10 * columns * (sequenceTokens / 2.0),
            OpKind.Logits or OpKind.CrossEntropy => 2 * columns * graph.Values[node.Inputs[0]].Columns,
            _ => FlopsPerElement * columns,
        };
    }
}
