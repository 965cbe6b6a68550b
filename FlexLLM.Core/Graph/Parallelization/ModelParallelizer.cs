namespace FlexLLM.Graph.Parallelization;

/// <summary>How a linear of the backbone is divided (Megatron): by outputs, by inputs, or not at all.</summary>
internal enum LinearDivision
{
    Replicated,
    ByOutputs,
    ByInputs,
}

/// <summary>
/// The second pass of the compiler (paper section 5.1): from the graph of the whole model to the graph of one rank of a
/// tensor-parallel group. The backbone's plan is fixed: linears as <see cref="LinearDivision"/> says, everything between them on
/// the rank's columns, embedding, norms and head on all; bypass networks follow their own plans. Values keep their names.
/// </summary>
internal sealed class ModelParallelizer
{
    private readonly ParallelGraph _whole;
    private readonly int _ranks;
    private readonly Func<string, LinearDivision> _divisionOf;
    private readonly Func<int, BypassPlan> _planOf;
    private readonly GraphBuilder _builder = new();
    private readonly Dictionary<int, int> _values = [];
    private readonly Dictionary<int, TensorLayout> _layouts = [];
    private readonly Dictionary<int, int> _copied = [];
    private readonly Dictionary<int, int> _reduced = [];
    private readonly Dictionary<int, int> _networks = [];
    private readonly ILookup<int, GraphNode> _networkNodes;
    private readonly GraphNode?[] _producers;

    private ModelParallelizer(
        ParallelGraph whole, int ranks, Func<string, LinearDivision> divisionOf, Func<int, BypassPlan> planOf)
    {
        (_whole, _ranks, _divisionOf, _planOf) = (whole, ranks, divisionOf, planOf);
        _producers = whole.ForwardProducers();
        _networkNodes = whole.Nodes.Where(n => n.Site >= 0 && n.Op != OpKind.Bypass).ToLookup(n => n.Site);
    }

    /// <param name="whole">A forward graph, with networks or with places for them.</param>
    /// <param name="ranks">Ranks of the group.</param>
    /// <param name="divisionOf">Division of a linear, by the name of its weight.</param>
    /// <param name="planOf">Plan of the network at a site.</param>
    public static ParallelGraph Parallelize(
        ParallelGraph whole, int ranks, Func<string, LinearDivision> divisionOf, Func<int, BypassPlan> planOf)
    {
        var pass = new ModelParallelizer(whole, ranks, divisionOf, planOf);
        foreach (GraphNode node in whole.Nodes)
        {
            pass._builder.Layer = node.Layer;
            pass.Append(node);
        }

        return GraphVerifier.Verify(pass._builder.Build());
    }

    private void Append(GraphNode node)
    {
        if (node.Site >= 0 && node.Op != OpKind.Bypass)
        {
            if (!_networks.ContainsKey(node.Site))
            {
                _networks[node.Site] = AppendNetwork(node);
            }

            return;
        }

        int[] inputs = node.Op switch
        {
            OpKind.Linear => LinearInputs(node),
            OpKind.Bypass => [Tap(node)],
            OpKind.Add => AddInputs(node),
            _ => [.. node.Inputs.Select(Finished)],
        };
        TensorLayout layout = node.Op switch
        {
            OpKind.Linear => DivisionOf(node) switch
            {
                LinearDivision.ByOutputs => TensorLayout.SplitColumns,
                LinearDivision.ByInputs => TensorLayout.PreReduce,
                _ => TensorLayout.Replicated,
            },
            OpKind.Add or OpKind.Bypass => LayoutOf(node),
            _ when node.Inputs.All(i => _whole.Values[i].IsWeight) => TensorLayout.Replicated,
            _ => _layouts[node.Inputs[0]] == TensorLayout.SplitColumns ? TensorLayout.SplitColumns : TensorLayout.Replicated,
        };
        int[] outputs = [.. node.Outputs.Select(o => New(o, layout))];
        _builder.Node(node, node.Op, inputs, outputs);
        if (node.Op == OpKind.Add && IsBypassAdd(node) && layout == TensorLayout.PreReduce && IsPlace(node))
        {
            AppendPlaceAfterReduce(node);
        }
    }

    private TensorLayout LayoutOf(GraphNode node)
    {
        if (node.Op == OpKind.Bypass)
        {
            return _layouts[AddOf(node).Inputs[0]];
        }

        if (IsBypassAdd(node) && !IsPlace(node) && _layouts[node.Inputs[0]] == TensorLayout.PreReduce)
        {
            return PlanOf(node).Add.Layout;
        }

        TensorLayout first = _layouts[node.Inputs[0]];
        return IsBypassAdd(node) && IsAround(node) ? first : first == TensorLayout.PreReduce ? TensorLayout.Replicated : first;
    }

    // A column-parallel linear reads a copy whose gradient ends in an all-reduce; a row-parallel one the rank's columns.
    private int[] LinearInputs(GraphNode node)
    {
        int x = DivisionOf(node) == LinearDivision.ByOutputs ? Copied(node.Inputs[0]) : Finished(node.Inputs[0]);
        int inputColumns = _builder[x].Columns;
        int weight = _builder.Weight(_whole.Values[node.Inputs[1]].Name, inputColumns);
        return node.Inputs.Length < 3
            ? [x, weight]
            : [x, weight, _builder.Weight(_whole.Values[node.Inputs[2]].Name, ColumnsOf(node.Outputs[0], DivisionOf(node)))];
    }

    private int[] AddInputs(GraphNode node)
    {
        if (!IsBypassAdd(node))
        {
            return [Finished(node.Inputs[0]), Finished(node.Inputs[1])];
        }

        int f = IsPlace(node) ? _values[node.Inputs[1]] : _networks[_producers[node.Inputs[1]]!.Site];
        bool reducesFirst = IsAround(node) ? LayoutOf(node) == TensorLayout.Replicated : true;
        return [reducesFirst ? Finished(node.Inputs[0]) : _values[node.Inputs[0]], f];
    }

    private int AppendNetwork(GraphNode first)
    {
        GraphNode[] nodes = [.. _networkNodes[first.Site]];
        BypassPlan plan = _planOf(first.Site);
        int tap = plan.Tap == BypassTap.ColumnParallel ? Copied(first.Inputs[0]) : Finished(first.Inputs[0]);
        return NetworkParallelizer.Append(_builder, _whole, nodes, plan, tap);
    }

    private int Tap(GraphNode place) => place.Attachment == BypassAttachment.Around && _layouts[place.Inputs[0]] == TensorLayout.Replicated
        ? Copied(place.Inputs[0])
        : Finished(place.Inputs[0]);

    // Beside a row-parallel linear a network may also be added after the sum over ranks.
    private void AppendPlaceAfterReduce(GraphNode add)
    {
        GraphNode place = _producers[add.Inputs[1]]!;
        int sum = Finished(add.Outputs[0]);
        string name = _whole.Values[add.Outputs[0]].Name;
        int f = _builder.Value($"{name}.bypass.{BypassAttachment.AroundReduced}", ValueKind.Activation, _builder[sum].Columns);
        _builder.Node(place with { Attachment = BypassAttachment.AroundReduced }, OpKind.Bypass, [Finished(place.Inputs[0])], [f]);
        _reduced[add.Outputs[0]] = _builder.Activation(OpKind.Add, $"{name}.after", _builder[sum].Columns, sum, f);
    }

    // The value without a sum outstanding.
    private int Finished(int value)
    {
        if (_whole.Values[value].IsWeight)
        {
            return _values.TryGetValue(value, out int known) ? known : _values[value] = _builder.Weight(_whole.Values[value].Name,
                _whole.Values[value].Columns);
        }

        if (_layouts[value] != TensorLayout.PreReduce)
        {
            return _values[value];
        }

        if (!_reduced.TryGetValue(value, out int sum))
        {
            // One name for the module's sum, wherever a network stands before it.
            string[] parts = _whole.Values[value].Name.Split('.');
            string name = $"{string.Join('.', parts[..3])}.reduced";
            sum = _reduced[value] = _builder.Value(name, ValueKind.Activation, _whole.Values[value].Columns);
            _builder.Move(MoveKind.AllReduce, -1, _values[value], sum);
        }

        return sum;
    }

    private int Copied(int value)
    {
        int x = Finished(value);
        if (!_copied.TryGetValue(x, out int copy))
        {
            copy = _copied[x] = _builder.Value($"{_whole.Values[value].Name}.copy", ValueKind.Activation, _builder[x].Columns);
            _builder.Move(MoveKind.Pass, -1, x, copy, MoveKind.AllReduce);
        }

        return copy;
    }

    private int New(int value, TensorLayout layout)
    {
        GraphValue whole = _whole.Values[value];
        int columns = layout == TensorLayout.SplitColumns ? whole.Columns / _ranks : whole.Columns;
        _layouts[value] = layout;
        return _values[value] = _builder.Value(whole.Name, whole.Kind, columns);
    }

    private int ColumnsOf(int value, LinearDivision division) =>
        division == LinearDivision.ByOutputs ? _whole.Values[value].Columns / _ranks : _whole.Values[value].Columns;

    private LinearDivision DivisionOf(GraphNode linear) => _divisionOf(_whole.Values[linear.Inputs[1]].Name);

    private bool IsBypassAdd(GraphNode add) => _producers[add.Inputs[1]] is { Site: >= 0 };

    private bool IsPlace(GraphNode add) => _producers[add.Inputs[1]]!.Op == OpKind.Bypass;

    private bool IsAround(GraphNode add) => IsPlace(add)
        ? _producers[add.Inputs[1]]!.Attachment == BypassAttachment.Around
        : !PlanOf(add).Tap.IsSerial;

    private BypassPlan PlanOf(GraphNode add) => _planOf(_producers[add.Inputs[1]]!.Site);

    private GraphNode AddOf(GraphNode place) => _whole.Nodes[place.Id + 1];
}
