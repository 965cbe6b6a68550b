using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>Lowers the backward half of a pruned training graph to instructions by layer.</summary>
internal sealed class BackwardLowering
{
    private readonly ParallelGraph _graph;
    private readonly ForwardProgram _forward;
    private readonly WeightTable _weights;
    private readonly GraphNode[] _nodes;
    private readonly SlotAllocator _slots;
    private readonly List<SavedValue> _saved = [];
    private readonly List<Capture> _captures = [];
    private readonly HashSet<GraphNode> _fused = [];
    private readonly List<Instruction> _before = [];

    private BackwardLowering(ParallelGraph graph, ForwardProgram forward, WeightTable weights)
    {
        (_graph, _forward, _weights) = (graph, forward, weights);
        _nodes = [.. graph.Nodes.Where(n => n.IsBackward && n.Layer >= 0)];
        _slots = new SlotAllocator(graph, _nodes);
    }

    /// <summary>Takes a pruned graph whose LoRA networks are fused.</summary>
    /// <param name="graph">The job's graph after all passes.</param>
    /// <param name="forward">The forward program that leaves the values it reads.</param>
    /// <param name="weights">Indices of backbone weights.</param>
    /// <param name="layers">Decoder layers.</param>
    public static TrainingProgram Lower(ParallelGraph graph, ForwardProgram forward, WeightTable weights, int layers)
    {
        var lowering = new BackwardLowering(graph, forward, weights);
        Check.That(lowering._nodes.Any(n => n.Site >= 0), "a training graph has a trainable bypass");
        lowering.PlaceForwardValues();
        List<Instruction>[] program = [.. Enumerable.Range(0, layers).Select(_ => new List<Instruction>())];
        for (int index = 0; index < lowering._nodes.Length; index++)
        {
            GraphNode node = lowering._nodes[index];
            List<Instruction> layer = program[node.Layer];
            if (!lowering._fused.Contains(node))
            {
                Instruction instruction = lowering.Lower(node, index);
                layer.AddRange(lowering._before);
                lowering._before.Clear();
                layer.Add(instruction);
            }

            IReadOnlyList<int> freed = lowering._slots.Release(node, index);
            if (freed.Count > 0)
            {
                layer[^1] = layer[^1] with { Frees = [.. layer[^1].Frees, .. freed] };
            }
        }

        return new TrainingProgram
        {
            Saved = lowering._saved,
            Captures = [.. lowering._captures.OrderBy(c => c.Instruction)],
            Layers = program,
            LowestLayer = lowering._nodes.Min(n => n.Layer),
            Arena = lowering._slots.Layout,
            Sites = [.. graph.Nodes.Where(n => n.Site >= 0).Select(n => n.Site).Distinct().Order()],
            Graph = graph,
        };
    }

    // Keys and values are read from the KV cache; everything else that a backward node reads is saved.
    private void PlaceForwardValues()
    {
        HashSet<int> cached = _graph.CachedValues();
        HashSet<int> lse = [.. _nodes.Where(n => n.Op == OpKind.AttentionBackward).Select(n => n.Inputs[4])];
        HashSet<int> made = [.. _nodes.SelectMany(n => n.Outputs)];
        Dictionary<int, int> sources = _graph.Nodes.Where(n => n.Op == OpKind.Pack).ToDictionary(n => n.Outputs[0], n => n.Inputs[0]);
        foreach (int id in _nodes.SelectMany(n => n.Inputs).Where(i => !made.Contains(i)).Distinct().Order())
        {
            GraphValue value = _graph.Values[id];
            if (value.Kind == ValueKind.Activation && cached.Contains(id))
            {
                _slots.Place(id, BufferRef.None);
            }
            else if (value.Kind == ValueKind.Activation)
            {
                _slots.Place(id, BufferRef.Saved(_saved.Count));
                if (!lse.Contains(id))
                {
                    ValuePlace place = _forward.Places[_graph.Values[sources.GetValueOrDefault(id, id)].Name];
                    _captures.Add(new Capture(place.Instruction, place.Slot, _saved.Count));
                }

                _saved.Add(new SavedValue(value.Name, value.Layer, value.Columns, lse.Contains(id), value.Packed));
            }
            else if (value.Kind == ValueKind.Gradient)
            {
                // Made by the loss instructions: the gradient that enters the last layer.
                _slots.Place(id, new BufferRef(BufferKind.Boundary));
            }
        }
    }

    private Instruction Lower(GraphNode node, int index)
    {
        BufferRef[] inputs = [.. node.Inputs.Where(v => !_graph.Values[v].IsWeight).Select(v => _slots[v])];
        bool accumulate = false;
        BufferRef[] outputs;
        switch (node.Op)
        {
            case OpKind.LinearBackwardInput or OpKind.Widen when !node.Recomputes:
                outputs = [Contribution(node, node.Outputs[0], index, out accumulate)];
                break;
            case OpKind.RmsNormBackward:
                accumulate = TryAccumulate(node, node.Outputs[0], index);
                outputs = [accumulate ? _slots[node.Outputs[0]] : InPlaceOf(node, 0, index)];
                break;
            case OpKind.LoraBackward:
                outputs = [Contribution(node, node.Outputs[2], index, out accumulate)];
                break;
            case OpKind.ScaleColumnsBackward:
                outputs = [Contribution(node, node.Outputs[1], index, out accumulate)];
                break;
            case OpKind.OuterProduct or OpKind.AddBiasBackward:
                outputs = [BufferRef.None]; // The adapter's gradients are found by site and weight.
                break;
            case OpKind.LinearBackwardWeight or OpKind.RmsNormBackwardGain:
                outputs = [BufferRef.None]; // Only an unpruned graph asks for gradients of frozen weights.
                break;
            case OpKind.Rope or OpKind.RopeBackward:
                Check.That(_slots.TryInherit(node.Outputs[0], node.Inputs[0], index), "RoPE rotates in place");
                outputs = [_slots[node.Outputs[0]]];
                break;
            case OpKind.SiluGateBackward:
                outputs = [InPlaceOf(node, 0, index), Fresh(node.Outputs[1])];
                break;
            case OpKind.AttentionBackward:
                outputs =
                [
                    Fresh(node.Outputs[0]),
                    _slots.Place(node.Outputs[1], new BufferRef(BufferKind.KeyGradient)),
                    _slots.Place(node.Outputs[2], new BufferRef(BufferKind.ValueGradient)),
                ];
                break;
            case OpKind.Attention:
                _slots.Place(node.Outputs[1], BufferRef.None); // Nobody reads the log-sum-exp that the forward pass saved already.
                outputs = [Fresh(node.Outputs[0])];
                break;
            case OpKind.Move when node.Move == MoveKind.Pass:
                outputs = [_slots.Place(node.Outputs[0], _slots[node.Inputs[0]])];
                break;
            case OpKind.Move when node.Move == MoveKind.AllReduce:
                outputs = [InPlaceOf(node, 0, index)];
                break;
            case OpKind.Lora:
                Check.That(_slots.TryInherit(node.Outputs[0], node.Inputs[3], index), "the base of a bypass is added to in place");
                outputs = [_slots[node.Outputs[0]]];
                break;
            case OpKind.AddGradient or OpKind.Add or OpKind.AddBias or OpKind.Relu or OpKind.Silu or OpKind.ReluBackward or
                OpKind.SiluBackward:
                outputs = [InPlaceOf(node, 0, index)];
                break;
            case OpKind.RmsNorm or OpKind.SiluGate or OpKind.Linear or OpKind.Narrow or OpKind.Widen or OpKind.ScaleColumns or
                OpKind.Unpack or OpKind.Move:
                outputs = [Fresh(node.Outputs[0])];
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(node), node.Op, "Add a lowering for this operation.");
        }

        return new Instruction(node.Op, node.Layer, inputs, outputs)
        {
            Weight = WeightOf(node),
            Bias = node.Op == OpKind.Linear && node.Inputs.Length == 3 ? _weights.IndexOf(_graph.Values[node.Inputs[2]].Name) : -1,
            Site = node.Site,
            Accumulate = accumulate,
            Scaled = node.Scaled,
            Move = node.Move,
            OnRankZeroOnly = node.OnRankZeroOnly,
            Packed = node.Op == OpKind.Unpack ? _graph.Values[node.Inputs[0]].Packed : null,
        };
    }

    private int WeightOf(GraphNode node) => node.Op switch
    {
        OpKind.LinearBackwardInput or OpKind.RmsNormBackward or OpKind.RmsNorm or OpKind.Linear =>
            _weights.IndexOf(_graph.Values[node.Inputs[1]].Name),
        OpKind.LinearBackwardWeight or OpKind.RmsNormBackwardGain =>
            _weights.IndexOf(_graph.Values[node.Outputs[0]].Name["d ".Length..]),
        _ => node.BypassWeight,
    };

    // A contribution to a gradient: none where nobody reads it, else added in place where that is possible.
    private BufferRef Contribution(GraphNode node, int output, int index, out bool accumulate)
    {
        accumulate = _slots.IsRead(output) && TryAccumulate(node, output, index);
        return !_slots.IsRead(output) ? BufferRef.None : accumulate ? _slots[output] : Fresh(output);
    }

    // A contribution that the very next AddGradient sums into a gradient continues that sum.
    private bool TryAccumulate(GraphNode node, int contribution, int index)
    {
        int sum = index + 1;
        while (sum < _nodes.Length && (_nodes[sum].Op != OpKind.AddGradient || _nodes[sum].Inputs[1] != contribution) && sum - index <= 3)
        {
            sum++;
        }

        if (sum >= _nodes.Length || _nodes[sum].Op != OpKind.AddGradient || _nodes[sum].Inputs[1] != contribution)
        {
            return false;
        }

        // Continuing a sum has other bits than adding to it: what is read again later is copied, so that bits do not depend on it.
        int left = _nodes[sum].Inputs[0];
        BufferRef place = _slots[left];
        if (!_slots.DiesAt(left, sum) || place.Kind == BufferKind.Saved)
        {
            BufferRef copy = Fresh(_nodes[sum].Outputs[0]);
            _before.Add(new Instruction(OpKind.Move, node.Layer, [place], [copy]) { Move = MoveKind.Pass });
            place = copy;
        }
        else
        {
            _slots.Place(_nodes[sum].Outputs[0], place);
        }

        _slots.Place(contribution, place);
        _fused.Add(_nodes[sum]);
        return true;
    }

    private BufferRef InPlaceOf(GraphNode node, int input, int index)
    {
        int output = node.Outputs[0];
        return _slots.TryInherit(output, node.Inputs[input], index) ? _slots[output] : Fresh(output);
    }

    private BufferRef Fresh(int value) => _slots.Take(value, _graph.Values[value].Columns);
}
