using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>Lowers the forward half of a graph (and the loss, which runs with it) to backend instructions.</summary>
internal static class ForwardLowering
{
    /// <summary>
    /// Takes the graph that serves, with the loss and its gradient down to the last layer's output. Its forward nodes become the
    /// body, its nodes outside the layers that follow the loss become the loss instructions. A bypass and its add are one
    /// instruction that accumulates in place.
    /// </summary>
    public static ForwardProgram Lower(ParallelGraph graph, WeightTable weights)
    {
        GraphNode[] nodes = [.. graph.Nodes.Where(n => !n.IsBackward || n.Layer < 0)];
        var slots = new SlotAllocator(graph, nodes);
        var body = new List<Instruction>();
        var loss = new List<Instruction>();
        var places = new Dictionary<string, ValuePlace>();
        Instruction? logits = null;
        for (int index = 0; index < nodes.Length; index++)
        {
            GraphNode node = nodes[index];
            List<Instruction> program = node.Op == OpKind.CrossEntropy || node.IsBackward ? loss : body;
            if (node.Op == OpKind.Bypass)
            {
                // Y = f_B(X) + f_A(X), in place of f_B(X), which the add that follows reads.
                GraphNode add = nodes[index + 1];
                Check.That(add.Op == OpKind.Add && add.Inputs[1] == node.Outputs[0]);
                slots.Place(node.Outputs[0], BufferRef.None);
                body.Add(new Instruction(OpKind.Bypass, node.Layer, [slots[node.Inputs[0]]], [slots[add.Inputs[0]]])
                {
                    Site = node.Site,
                    Attachment = node.Attachment,
                    Accumulate = true,
                });
            }
            else if (node.Op == OpKind.Add && slots[node.Inputs[1]].Kind == BufferKind.None)
            {
                Check.That(slots.TryInherit(node.Outputs[0], node.Inputs[0], index));
                places[graph.Values[node.Outputs[0]].Name] = new ValuePlace(body.Count - 1, slots[node.Outputs[0]].Index);
            }
            else
            {
                Instruction instruction = LowerPlain(node, index);
                if (node is { Op: OpKind.Move, Move: MoveKind.Pass })
                {
                    // Another name for what stands there already.
                    places[graph.Values[node.Outputs[0]].Name] = new ValuePlace(body.Count - 1, instruction.Outputs[0].Index);
                    slots.Release(node, index);
                    continue;
                }

                if (node.Op == OpKind.Logits)
                {
                    logits = instruction;
                    continue; // Runs for chosen rows, after the loss: what it reads lives on.
                }

                program.Add(instruction);
                if (program == body && instruction.Outputs[0].Kind == BufferKind.Slot)
                {
                    places[graph.Values[node.Outputs[0]].Name] = new ValuePlace(body.Count - 1, instruction.Outputs[0].Index);
                }
            }

            IReadOnlyList<int> freed = slots.Release(node, index);
            if (freed.Count > 0 && program == body)
            {
                body[^1] = body[^1] with { Frees = [.. body[^1].Frees, .. freed] };
            }
        }

        return new ForwardProgram
        {
            Body = body,
            Logits = logits ?? throw new InvalidOperationException("The graph has no Logits node."),
            Loss = loss,
            Arena = slots.Layout,
            Places = places,
        };

        Instruction LowerPlain(GraphNode node, int index)
        {
            BufferRef[] outputs = Outputs(node, index);
            int weightPlace = node.Op switch
            {
                OpKind.Embed => 0,
                OpKind.RmsNorm or OpKind.Linear or OpKind.Logits or OpKind.CrossEntropy or OpKind.RmsNormBackward => 1,
                _ => -1,
            };
            BufferRef[] inputs = [.. node.Inputs.Where(i => !graph.Values[i].IsWeight).Select(v => slots[v])];
            return new Instruction(node.Op, node.Layer, inputs, outputs)
            {
                Weight = weightPlace < 0 ? -1 : weights.IndexOf(graph.Values[node.Inputs[weightPlace]].Name),
                Bias = node.Op == OpKind.Linear && node.Inputs.Length == 3 ? weights.IndexOf(graph.Values[node.Inputs[2]].Name) : -1,
                Move = node.Move,
            };
        }

        BufferRef[] Outputs(GraphNode node, int index)
        {
            int output = node.Outputs[0];
            int columns = graph.Values[output].Columns;
            switch (node.Op)
            {
                case OpKind.Move when node.Move == MoveKind.Pass:
                    return [slots.Place(output, slots[node.Inputs[0]])];
                case OpKind.Rope:
                    Check.That(slots.TryInherit(output, node.Inputs[0], index), "RoPE rotates in place");
                    return [slots[output]];
                case OpKind.Attention:
                    // The log-sum-exp goes straight to a job's saved value; inference has no use for it.
                    return [slots.Take(output, columns), BufferRef.None];
                case OpKind.Logits:
                    return [BufferRef.None];
                case OpKind.CrossEntropy:
                    return [BufferRef.None, slots.Take(node.Outputs[1], graph.Values[node.Outputs[1]].Columns)];
                case OpKind.RmsNormBackward:
                    return [slots.Place(output, new BufferRef(BufferKind.Boundary))];
                case OpKind.SiluGate or OpKind.Add or OpKind.RmsNorm or OpKind.Move:
                    foreach (int input in node.Inputs)
                    {
                        if (!graph.Values[input].IsWeight && slots.TryInherit(output, input, index))
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
