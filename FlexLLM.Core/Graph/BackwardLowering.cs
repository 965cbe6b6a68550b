using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>Lowers the backward half of a pruned training graph to instructions by layer.</summary>
internal static class BackwardLowering
{
    public static TrainingProgram Lower(ParallelGraph graph, ForwardProgram forward, WeightTable weights, int layers)
    {
        GraphNode[] nodes = [.. graph.Nodes.Where(n => n.IsBackward && n.Layer >= 0)];
        Check.That(nodes.Any(n => n.Op == OpKind.LoraBackward), "a training graph has a trainable bypass");
        var saved = new List<SavedValue>();
        var captures = new List<Capture>();
        var slots = new SlotAllocator(graph, nodes);
        PlaceForwardValues();

        var program = new List<Instruction>[layers];
        for (int layer = 0; layer < layers; layer++)
        {
            program[layer] = [];
        }

        var fused = new HashSet<GraphNode>();
        for (int index = 0; index < nodes.Length; index++)
        {
            if (!fused.Contains(nodes[index]))
            {
                program[nodes[index].Layer].Add(Lower(nodes[index], index));
            }

            slots.Release(nodes[index], index);
        }

        return new TrainingProgram
        {
            Saved = saved,
            Captures = [.. captures.OrderBy(c => c.Instruction)],
            Layers = program,
            LowestLayer = nodes.Min(n => n.Layer),
            SlotColumns = slots.Columns,
            Sites = [.. nodes.Where(n => n.Op == OpKind.LoraBackward).Select(n => n.Site).Order()],
            Graph = graph,
        };

        // Keys and values are read from the KV cache; everything else that a backward node reads is saved.
        void PlaceForwardValues()
        {
            HashSet<int> cached = [.. nodes.Where(n => n.Op == OpKind.AttentionBackward).SelectMany(n => n.Inputs[2..4])];
            HashSet<int> lse = [.. nodes.Where(n => n.Op == OpKind.AttentionBackward).Select(n => n.Inputs[4])];
            HashSet<int> made = [.. nodes.SelectMany(n => n.Outputs)];
            foreach (int id in nodes.SelectMany(n => n.Inputs).Where(i => !made.Contains(i)).Distinct().Order())
            {
                GraphValue value = graph.Values[id];
                if (value.Kind == ValueKind.Activation && cached.Contains(id))
                {
                    slots.Place(id, BufferRef.None);
                }
                else if (value.Kind == ValueKind.Activation)
                {
                    slots.Place(id, BufferRef.Saved(saved.Count));
                    if (!lse.Contains(id))
                    {
                        ValuePlace place = forward.Places[value.Name];
                        captures.Add(new Capture(place.Instruction, place.Slot, saved.Count));
                    }

                    saved.Add(new SavedValue(value.Name, value.Layer, value.Columns, lse.Contains(id)));
                }
                else if (value.Kind == ValueKind.Gradient)
                {
                    // Made by the loss instructions: the gradient that enters the last layer.
                    slots.Place(id, new BufferRef(BufferKind.Boundary));
                }
            }
        }

        Instruction Lower(GraphNode node, int index)
        {
            BufferRef[] inputs = [.. node.Inputs.Where(v => !IsWeight(v)).Select(v => slots[v])];
            int weight = node.Op is OpKind.LinearBackwardInput or OpKind.RmsNormBackward or OpKind.RmsNorm
                ? weights.IndexOf(graph.Values[node.Inputs[1]].Name)
                : -1;
            bool accumulate = false;
            BufferRef[] outputs;
            switch (node.Op)
            {
                case OpKind.LinearBackwardInput:
                    accumulate = TryAccumulate(node.Outputs[0], index);
                    outputs = [accumulate ? slots[node.Outputs[0]] : Fresh(node.Outputs[0])];
                    break;
                case OpKind.RmsNormBackward:
                    accumulate = TryAccumulate(node.Outputs[0], index);
                    if (!accumulate && !slots.TryInherit(node.Outputs[0], node.Inputs[0], index))
                    {
                        Fresh(node.Outputs[0]);
                    }

                    outputs = [slots[node.Outputs[0]]];
                    break;
                case OpKind.LoraBackward:
                    accumulate = slots.IsRead(node.Outputs[2]) && TryAccumulate(node.Outputs[2], index);
                    outputs =
                    [
                        !slots.IsRead(node.Outputs[2]) ? BufferRef.None
                        : accumulate ? slots[node.Outputs[2]]
                        : Fresh(node.Outputs[2]),
                    ];
                    break;
                case OpKind.RmsNorm or OpKind.SiluGate:
                    outputs = [Fresh(node.Outputs[0])];
                    break;
                case OpKind.RopeBackward or OpKind.Rope:
                    Check.That(slots.TryInherit(node.Outputs[0], node.Inputs[0], index), "RoPE rotates in place");
                    outputs = [slots[node.Outputs[0]]];
                    break;
                case OpKind.SiluGateBackward:
                    BufferRef dGate = slots.TryInherit(node.Outputs[0], node.Inputs[0], index)
                        ? slots[node.Outputs[0]]
                        : Fresh(node.Outputs[0]);
                    outputs = [dGate, Fresh(node.Outputs[1])];
                    break;
                case OpKind.AttentionBackward:
                    outputs =
                    [
                        Fresh(node.Outputs[0]),
                        slots.Place(node.Outputs[1], new BufferRef(BufferKind.KeyGradient)),
                        slots.Place(node.Outputs[2], new BufferRef(BufferKind.ValueGradient)),
                    ];
                    break;
                case OpKind.AddGradient:
                    outputs = [slots.TryInherit(node.Outputs[0], node.Inputs[0], index) ? slots[node.Outputs[0]] : Fresh(node.Outputs[0])];
                    break;
                default:
                    throw new ArgumentOutOfRangeException(nameof(node), node.Op, "Add a lowering for this operation.");
            }

            return new Instruction(node.Op, node.Layer, inputs, outputs) { Weight = weight, Site = node.Site, Accumulate = accumulate };
        }

        // A contribution that the very next AddGradient sums into a gradient which nobody reads later is added in place.
        bool TryAccumulate(int contribution, int index)
        {
            int sum = index + 1;
            while (sum < nodes.Length && (nodes[sum].Op != OpKind.AddGradient || nodes[sum].Inputs[1] != contribution) && sum - index <= 3)
            {
                sum++;
            }

            if (sum >= nodes.Length || nodes[sum].Op != OpKind.AddGradient || nodes[sum].Inputs[1] != contribution ||
                !slots.DiesAt(nodes[sum].Inputs[0], sum))
            {
                return false;
            }

            BufferRef place = slots[nodes[sum].Inputs[0]];
            slots.Place(contribution, place);
            slots.Place(nodes[sum].Outputs[0], place);
            fused.Add(nodes[sum]);
            return true;
        }

        BufferRef Fresh(int value) => slots.Take(value, graph.Values[value].Columns);

        bool IsWeight(int value) => graph.Values[value].Kind is ValueKind.FrozenWeight or ValueKind.TrainableWeight;
    }
}
