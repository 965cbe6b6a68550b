using FlexLLM.Primitives;

namespace FlexLLM.Graph.Parallelization;

/// <summary>
/// Turns a bypass network of a graph into what one rank computes of it under a plan: the same operations on the widths that the
/// rank has, with a move wherever the plan changes a layout.
/// </summary>
internal sealed class NetworkParallelizer
{
    private readonly GraphBuilder _builder;
    private readonly ParallelGraph _whole;
    private readonly GraphNode[] _nodes;
    private readonly BypassPlan _plan;
    private int _next;

    private NetworkParallelizer(GraphBuilder builder, ParallelGraph whole, GraphNode[] nodes, BypassPlan plan) =>
        (_builder, _whole, _nodes, _plan) = (builder, whole, nodes, plan);

    /// <summary>Appends a network to a rank's graph; returns its result.</summary>
    /// <param name="builder">The rank's graph.</param>
    /// <param name="whole">The graph of the undivided model.</param>
    /// <param name="nodes">The network's forward nodes there, in order.</param>
    /// <param name="plan">The plan.</param>
    /// <param name="tap">The rank's value that it reads, in the layout of the plan's tap.</param>
    public static int Append(GraphBuilder builder, ParallelGraph whole, GraphNode[] nodes, BypassPlan plan, int tap) =>
        new NetworkParallelizer(builder, whole, nodes, plan).Append(tap);

    /// <summary>A graph that holds nothing but a network, as one rank has it: its builder, its tap and its result.</summary>
    public static (GraphBuilder Builder, int Tap, int Result) OfNetwork(ParallelGraph whole, BypassPlan plan)
    {
        GraphNode[] nodes = [.. whole.Nodes];
        GraphValue x = whole.Values[nodes[0].Inputs[0]];
        var builder = new GraphBuilder();
        int tap = builder.Value(x.Name, ValueKind.Activation, plan.Tap.Input.ColumnsOn(0, plan.Ranks, x.Columns).Count);
        return (builder, tap, Append(builder, whole, nodes, plan, tap));
    }

    private int Append(int tap)
    {
        int value = tap;
        if (_plan.Backward[^1] is { Of: null, Move: { } atTap })
        {
            value = Move(value, MoveKind.Pass, KindOf(atTap), isRowSplit: false);
        }

        for (int i = 0; i < _plan.Forward.Count; i++)
        {
            GradientStep gradient = _plan.Backward[_plan.Forward.Count - 1 - i];
            value = _plan.Forward[i] switch
            {
                MoveStep move => Move(value, KindOf(move.Operator), GradientOf(move, gradient), move.To == TensorLayout.SplitRows,
                    move.LocalOutputWidth(_plan.Ranks)),
                ComputeStep compute => Compute(value, compute),
                _ => throw new ArgumentOutOfRangeException(nameof(tap), _plan.Forward[i], "Append the new kind of step here."),
            };
        }

        Check.That(_next == _nodes.Length, "the plan has an operator for each of the network's operations");
        return value;
    }

    private int Compute(int value, ComputeStep step)
    {
        value = Like(_nodes[_next++], value, step, onRankZeroOnly: false);
        if (step.Operator.HasBias)
        {
            value = Like(_nodes[_next++], value, step, OperatorRules.BiasOf(step.Case).OnRankZeroOnly);
        }

        return value;
    }

    // The whole graph's operation on this rank's widths.
    private int Like(GraphNode node, int value, ComputeStep step, bool onRankZeroOnly)
    {
        int columns = step.LocalOutputWidth(_plan.Ranks);
        int result = _builder.Value(
            _whole.Values[node.Outputs[0]].Name, ValueKind.Activation, columns, step.To == TensorLayout.SplitRows);
        int[] inputs = [value];
        if (node.Inputs.Length > 1)
        {
            // The wide side of a matrix is the input of what narrows and the output of what widens.
            int wide = node.Op == OpKind.Narrow ? step.LocalInputWidth(_plan.Ranks) : columns;
            inputs = [value, _builder.Weight(_whole.Values[node.Inputs[1]].Name, wide, trainable: true)];
        }

        _builder.Node(node with { OnRankZeroOnly = onRankZeroOnly }, node.Op, inputs, [result]);
        return result;
    }

    private int Move(int value, MoveKind move, MoveKind gradient, bool isRowSplit, int? columns = null)
    {
        if (move == MoveKind.Pass && gradient == MoveKind.Pass)
        {
            return value;
        }

        GraphValue from = _builder[value];
        string name = $"{_whole.Values[_nodes[0].Outputs[0]].Name}.move.{_builder.Count}";
        int result = _builder.Value(name, ValueKind.Activation, columns ?? from.Columns, isRowSplit);
        _builder.Move(move, _nodes[0].Site, value, result, gradient);
        return result;
    }

    private MoveKind GradientOf(MoveStep move, GradientStep gradient)
    {
        if (gradient.Move is { } back)
        {
            return KindOf(back);
        }

        if (move.SourceEverywhere)
        {
            // dX stays what the ranks' parts give: a slice goes to its place in the sum that the base linear ends with, or is made
            // whole at the tap.
            bool joins = _plan.Tap.InputGradient is null;
            Check.That(!joins || gradient.From != TensorLayout.Replicated, "copies would be summed");
            return gradient.From == TensorLayout.SplitColumns ? (joins ? MoveKind.PlaceColumns : MoveKind.Pass)
                : gradient.From == TensorLayout.SplitRows ? (joins ? MoveKind.PlaceRows : MoveKind.Pass)
                : MoveKind.Pass;
        }

        return !gradient.KeepsShare ? MoveKind.Pass
            : gradient.To == TensorLayout.SplitRows ? MoveKind.TakeRows
            : MoveKind.TakeColumns;
    }

    private static MoveKind KindOf(ParallelOperator op) => op.Kind switch
    {
        ParallelOperatorKind.Partition => op.To == TensorLayout.SplitRows ? MoveKind.TakeRows : MoveKind.TakeColumns,
        ParallelOperatorKind.Replicate => MoveKind.Pass,
        ParallelOperatorKind.AllReduce => MoveKind.AllReduce,
        ParallelOperatorKind.AllGather => op.From == TensorLayout.SplitRows ? MoveKind.AllGatherRows : MoveKind.AllGatherColumns,
        ParallelOperatorKind.ReduceScatter =>
            op.To == TensorLayout.SplitRows ? MoveKind.ReduceScatterRows : MoveKind.ReduceScatterColumns,
        ParallelOperatorKind.AllToAll => op.From == TensorLayout.SplitRows ? MoveKind.RowsToColumns : MoveKind.ColumnsToRows,
        _ => throw new ArgumentOutOfRangeException(nameof(op), op.Label, "Plans end on every rank; this leads to one."),
    };
}
