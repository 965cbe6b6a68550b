using FlexLLM.Primitives;

namespace FlexLLM.Graph;

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
        OpKind.Rope or OpKind.RopeBackward => (1, 1, 1),
        OpKind.Attention => (3, 3, 2),              // q, k, v -> heads, lse
        OpKind.AttentionBackward => (5, 5, 3),      // dHeads, q, k, v, lse -> dq, dk, dv
        OpKind.SiluGate => (2, 2, 1),               // gate, up -> y
        OpKind.SiluGateBackward => (3, 3, 2),       // dy, gate, up -> dGate, dUp
        OpKind.Add or OpKind.AddGradient => (2, 2, 1),
        OpKind.Logits => (2, 2, 1),                 // x, head -> logits
        OpKind.CrossEntropy => (2, 2, 2),           // x, head -> loss, dx
        OpKind.Bypass => (1, 1, 1),                 // x -> f
        OpKind.Narrow => (2, 2, 1),                 // x, M -> u
        OpKind.Widen => (2, 2, 1),                  // u, M -> y
        OpKind.OuterProduct => (2, 2, 1),           // u, x -> dM
        OpKind.AddBias => (2, 2, 1),                // x, bias -> y
        OpKind.AddBiasBackward => (1, 1, 1),        // dy -> dBias
        OpKind.Relu or OpKind.Silu => (1, 1, 1),    // x -> y
        OpKind.ReluBackward => (2, 2, 1),           // dy, y -> dx
        OpKind.SiluBackward => (2, 2, 1),           // dy, x -> dx
        OpKind.ScaleColumns => (2, 2, 1),           // x, gain -> y
        OpKind.ScaleColumnsBackward => (3, 3, 2),   // dy, x, gain -> dGain, dx
        OpKind.Pack or OpKind.Unpack => (1, 1, 1),  // x -> packed, packed -> x
        OpKind.Move => (1, 1, 1),                   // x -> x in another layout
        OpKind.Lora => (4, 4, 1),                   // x, A, B, base -> y
        OpKind.LoraBackward => (4, 4, 3),           // dy, x, A, B -> dA, dB, dx
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

            CheckWidths(graph, node);
        }

        return graph;
    }

    private static void CheckWidths(ParallelGraph graph, GraphNode node)
    {
        int Width(int value) => graph.Values[value].Columns;
        int first = Width(node.Inputs[0]);
        switch (node.Op)
        {
            case OpKind.Add or OpKind.AddGradient or OpKind.SiluGate or OpKind.ReluBackward or OpKind.SiluBackward:
                Check.That(first == Width(node.Inputs[1]) && first == Width(node.Outputs[0]));
                break;
            case OpKind.AddBias or OpKind.ScaleColumns:
                Check.That(first == Width(node.Inputs[1]) && first == Width(node.Outputs[0]));
                break;
            case OpKind.Relu or OpKind.Silu or OpKind.Rope or OpKind.RopeBackward:
                Check.That(first == Width(node.Outputs[0]));
                break;
            case OpKind.Narrow:
                Check.That(first == Width(node.Inputs[1]));
                break;
            case OpKind.Widen:
                Check.That(Width(node.Outputs[0]) == Width(node.Inputs[1]));
                break;
            case OpKind.OuterProduct:
                Check.That(Width(node.Inputs[1]) == Width(node.Outputs[0]));
                break;
            case OpKind.Pack:
                PackedFormat format = graph.Values[node.Outputs[0]].Packed!.Value;
                Check.That(Width(node.Outputs[0]) == PackedFormats.PackedColumns(first, format));
                break;
            default:
                break;
        }
    }
}
