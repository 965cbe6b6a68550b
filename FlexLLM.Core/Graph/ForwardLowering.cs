using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>Lowers the forward half of a graph (and the loss, which runs with it) to backend instructions.</summary>
internal static class ForwardLowering
{
    /// <summary>
    /// Takes a pruned training graph: its forward nodes become the body, its nodes outside the layers that follow the loss
    /// become the loss instructions. A bypass and its add are fused into one instruction that accumulates in place.
    /// </summary>
    public static ForwardProgram Lower(ParallelGraph graph, WeightTable weights)
    {
        GraphNode[] nodes = [.. graph.Nodes.Where(n => !n.IsBackward || n.Layer < 0)];
        var slots = new SlotAllocator(graph, nodes);
        var body = new List<Instruction>();
        var loss = new List<Instruction>();
        var places = new Dictionary<string, ValuePlace>();
        Instruction? logits = null;
        Dictionary<int, GraphNode> bypassOf = nodes.Where(n => n.Op == OpKind.Lora).ToDictionary(n => n.Outputs[0]);

        for (int index = 0; index < nodes.Length; index++)
        {
            GraphNode node = nodes[index];
            if (node.Op == OpKind.Lora)
            {
                continue; // Emitted by its add, whose other operand must exist first.
            }

            if (node.Op == OpKind.Add && bypassOf.TryGetValue(node.Inputs[1], out GraphNode? bypass))
            {
                // Y = f_B(X) + f_A(X), in place of f_B(X). Only now may X's slot be given away.
                Check.That(slots.TryInherit(node.Outputs[0], node.Inputs[0], index));
                BufferRef y = slots[node.Outputs[0]];
                Emit(new Instruction(OpKind.Lora, node.Layer, [slots[bypass.Inputs[0]]], [y]) { Site = bypass.Site, Accumulate = true });
                places[graph.Values[node.Outputs[0]].Name] = new ValuePlace(body.Count - 1, y.Index);
                slots.Release(node, index);
                ReleaseBypassInput(bypass, index);
                continue;
            }

            BufferRef[] outputs = Outputs(node, index);
            int weightPlace = node.Op switch
            {
                OpKind.Embed => 0,
                OpKind.RmsNorm or OpKind.Linear or OpKind.Logits or OpKind.CrossEntropy or OpKind.RmsNormBackward => 1,
                _ => -1,
            };
            BufferRef[] inputs = [.. node.Inputs.Where((_, place) => !IsWeight(node.Inputs[place])).Select(v => slots[v])];
            var instruction = new Instruction(node.Op, node.Layer, inputs, outputs)
            {
                Weight = weightPlace < 0 ? -1 : weights.IndexOf(graph.Values[node.Inputs[weightPlace]].Name),
                Bias = node.Op == OpKind.Linear && node.Inputs.Length == 3 ? weights.IndexOf(graph.Values[node.Inputs[2]].Name) : -1,
            };

            if (node.Op == OpKind.Logits)
            {
                logits = instruction;
            }
            else if (node.Op == OpKind.CrossEntropy || node.IsBackward)
            {
                loss.Add(instruction);
            }
            else
            {
                Emit(instruction);
                if (outputs[0].Kind == BufferKind.Slot)
                {
                    places[graph.Values[node.Outputs[0]].Name] = new ValuePlace(body.Count - 1, outputs[0].Index);
                }
            }

            if (!FeedsBypass(node, index))
            {
                slots.Release(node, index);
            }
        }

        return new ForwardProgram
        {
            Body = body,
            Logits = logits ?? throw new InvalidOperationException("The graph has no Logits node."),
            Loss = loss,
            SlotColumns = slots.Columns,
            Places = places,
        };

        void Emit(Instruction instruction) => body.Add(instruction);

        bool IsWeight(int value) => graph.Values[value].Kind is ValueKind.FrozenWeight or ValueKind.TrainableWeight;

        // The base linear between a bypass node and its add reads the same X, which must outlive it.
        bool FeedsBypass(GraphNode node, int index) =>
            node.Op == OpKind.Linear && index + 1 < nodes.Length && nodes[index + 1].Op == OpKind.Add &&
            bypassOf.TryGetValue(nodes[index + 1].Inputs[1], out GraphNode? next) && next.Inputs[0] == node.Inputs[0];

        void ReleaseBypassInput(GraphNode bypass, int index) =>
            slots.Release(bypass with { Inputs = [bypass.Inputs[0]], Outputs = [] }, index);

        BufferRef[] Outputs(GraphNode node, int index)
        {
            int output = node.Outputs[0];
            int columns = graph.Values[output].Columns;
            switch (node.Op)
            {
                case OpKind.Rope:
                    Check.That(slots.TryInherit(output, node.Inputs[0], index), "RoPE rotates in place");
                    return [slots[output]];
                case OpKind.Attention:
                    // The log-sum-exp goes straight to a job's saved value; inference has no use for it.
                    return [slots.Take(output, columns), BufferRef.None];
                case OpKind.Logits:
                    return [BufferRef.None];
                case OpKind.CrossEntropy:
                    return [BufferRef.None, slots.Take(node.Outputs[1], columns: graph.Values[node.Outputs[1]].Columns)];
                case OpKind.RmsNormBackward:
                    return [slots.Place(output, new BufferRef(BufferKind.Boundary))];
                case OpKind.SiluGate or OpKind.Add or OpKind.RmsNorm:
                    foreach (int input in node.Inputs)
                    {
                        if (!IsWeight(input) && slots.TryInherit(output, input, index))
                        {
                            return [slots[output]];
                        }
                    }

                    goto default;
                default:
                    return [slots.Take(output, columns)];
            }
        }
    }
}
