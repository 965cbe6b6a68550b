using FlexLLM.Graph.Parallelization;

namespace FlexLLM.Graph;

/// <summary>Lowers a network to the steps that run it over the rows of one adapter in a serving batch.</summary>
internal static class BypassLowering
{
    /// <param name="network">The network.</param>
    /// <param name="tapColumns">Width of the value that it reads.</param>
    /// <param name="addColumns">Width of the value that it is added to.</param>
    /// <param name="plan">How a group of ranks runs it; null on one device. Widths are those of the whole.</param>
    public static BypassProgram Lower(BypassNetwork network, int tapColumns, int addColumns, BypassPlan? plan = null)
    {
        var builder = new GraphBuilder();
        int x = builder.Value("x", ValueKind.Activation, tapColumns);
        bool isSerial = network.Attachment != BypassAttachment.Around;
        int f = new BypassBuilder(builder, site: 0, "f", "f", network, x, addColumns).Build();
        if (plan is not null)
        {
            (builder, x, f) = NetworkParallelizer.OfNetwork(builder.Build(), plan);
        }

        int sum = isSerial ? x : builder.Value("y", ValueKind.Activation, builder[f].Columns);
        builder.Activation(OpKind.Add, "sum", builder[f].Columns, sum, f);
        ParallelGraph graph = builder.Build();

        var slots = new SlotAllocator(graph, graph.Nodes);
        slots.Place(x, new BufferRef(BufferKind.Tap));
        slots.Place(sum, new BufferRef(BufferKind.Sum));
        var steps = new List<Instruction>();
        for (int index = 0; index < graph.Nodes.Count; index++)
        {
            GraphNode node = graph.Nodes[index];
            int output = node.Outputs[0];
            BufferRef[] inputs = [.. node.Inputs.Where(i => !graph.Values[i].IsWeight).Select(i => slots[i])];
            if (node is { Op: OpKind.Move, Move: MoveKind.Pass })
            {
                slots.Place(output, slots[node.Inputs[0]]);
                continue;
            }

            if (node.Op == OpKind.Add)
            {
                slots.Place(output, new BufferRef(BufferKind.Sum));
            }
            else if (!IsInPlace(node) || slots[node.Inputs[0]].Kind != BufferKind.Slot || !slots.TryInherit(output, node.Inputs[0], index))
            {
                slots.Take(output, graph.Values[output].Columns);
            }

            steps.Add(new Instruction(node.Op, node.Layer, inputs, [slots[output]])
            {
                Weight = node.BypassWeight,
                Scaled = node.Scaled,
                Move = node.Move,
                OnRankZeroOnly = node.OnRankZeroOnly,
            });
            slots.Release(node, index);
        }

        return new BypassProgram { Steps = steps, Arena = slots.Layout };
    }

    private static bool IsInPlace(GraphNode node) =>
        node.Op is OpKind.AddBias or OpKind.Relu or OpKind.Silu || node is { Op: OpKind.Move, Move: MoveKind.AllReduce };
}
