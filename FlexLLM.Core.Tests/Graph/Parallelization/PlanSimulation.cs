using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Graph.Parallelization;

/// <summary>What the simulation can be told to do wrong, to show that its checks notice.</summary>
internal enum PlantedFault
{
    None,
    AllReduceForgotten,
    WeightGradientsNotSummed,
    ReplicatedAddedOnEveryRank,
}

/// <summary>Y, dX and the gradient of each weight by name.</summary>
internal sealed record LayerResult(double[,] Y, double[,] InputGradient, IReadOnlyDictionary<string, double[,]> WeightGradients)
{
    public double DistanceTo(LayerResult other) => WeightGradients
        .Select(pair => Dense.Distance(pair.Value, other.WeightGradients[pair.Key]))
        .Append(Dense.Distance(Y, other.Y))
        .Append(Dense.Distance(InputGradient, other.InputGradient))
        .Max();
}

/// <summary>
/// A frozen linear W with a bypass, run on one rank (the truth) and on p simulated ranks exactly as a plan says, forward and
/// backward. The nonlinearity is ReLU.
/// </summary>
internal sealed class PlanSimulation
{
    private readonly Bypass _bypass;
    private readonly double[,] _x;
    private readonly double[,] _w;
    private readonly double[,] _g;
    private readonly Dictionary<string, double[,]> _weights = [];
    private SeededRandom _random;

    public PlanSimulation(Bypass bypass, int tokens, ulong seed)
    {
        _bypass = bypass;
        _random = new SeededRandom(seed);
        _x = Dense.Random(tokens, bypass.InputWidth, ref _random);
        _w = Dense.Random(bypass.OutputWidth, bypass.InputWidth, ref _random);
        _g = Dense.Random(tokens, bypass.OutputWidth, ref _random);
        foreach (BypassOperator op in bypass.Operators.Where(o => o.Kind == BypassOperatorKind.Linear))
        {
            _weights[op.Name] = Dense.Random(op.OutputWidth, op.InputWidth, ref _random);
        }
    }

    public LayerResult OnOneRank()
    {
        Stack<(BypassOperator Op, double[,] Input)> done = new();
        double[,] value = _x;
        foreach (BypassOperator op in _bypass.Operators)
        {
            done.Push((op, value));
            value = Forward(op, value, _weights.GetValueOrDefault(op.Name));
        }

        double[,] y = Plus(Dense.Product(_x, Dense.Transpose(_w)), value);
        Dictionary<string, double[,]> gradients = [];
        double[,] gradient = _g;
        foreach ((BypassOperator op, double[,] input) in done)
        {
            if (op.Kind == BypassOperatorKind.Linear)
            {
                gradients[op.Name] = Dense.Product(Dense.Transpose(gradient), input);
            }

            gradient = Backward(op, gradient, input, _weights.GetValueOrDefault(op.Name));
        }

        return new LayerResult(y, Plus(Dense.Product(_g, _w), gradient), gradients);
    }

    public LayerResult Run(BypassPlan plan, PlantedFault fault = PlantedFault.None)
    {
        int ranks = plan.Ranks;
        Dictionary<PlanStep, double[][,]> inputs = new(ReferenceEqualityComparer.Instance);
        double[][,] local = SimulatedRanks.Distribute(_x, plan.Tap.Input, ranks, ref _random);
        foreach (PlanStep step in plan.Forward)
        {
            inputs[step] = local;
            local = step switch
            {
                MoveStep move => Move(move.Operator, local, move.SourceEverywhere, fault),
                ComputeStep compute => SimulatedRanks.PerRank(ranks, rank =>
                    Forward(compute.Operator, inputs[step][rank], WeightOf(compute, rank, ranks))),
                _ => throw new NotSupportedException(),
            };
        }

        double[,] y = AddToBase(plan, local, fault);
        Dictionary<string, double[,]> gradients = [];
        double[][,] gradient = SimulatedRanks.Distribute(_g, plan.Add.Gradient, ranks, ref _random);
        foreach (GradientStep step in plan.Backward)
        {
            double[][,] g = gradient;
            if (step.Of is ComputeStep { Operator.Kind: BypassOperatorKind.Linear } linear)
            {
                gradients[linear.Operator.Name] = WeightGradient(step, linear, g, inputs[linear], fault);
            }

            gradient = step switch
            {
                { Of: ComputeStep compute } => SimulatedRanks.PerRank(ranks, rank => Backward(
                    compute.Operator, g[rank], inputs[compute][rank], WeightOf(compute, rank, ranks))),
                { Move: { } move } => Move(move, g, sourceEverywhere: false, fault),
                _ => SimulatedRanks.PerRank(ranks, rank => step.From == step.To
                    ? g[rank]
                    : SimulatedRanks.Slice(g[rank], step.To, rank, ranks)),
            };
        }

        return new LayerResult(y, JoinBaseGradient(plan, gradient), gradients);
    }

    /// <summary>Y = f_B(X) + f_A(X), where the base runs column-parallel or row-parallel as its tap says.</summary>
    private double[,] AddToBase(BypassPlan plan, double[][,] bypass, PlantedFault fault)
    {
        int ranks = plan.Ranks;
        TensorLayout baseWeight = plan.Tap.InputEverywhere ? TensorLayout.SplitRows : TensorLayout.SplitColumns;
        double[][,] x = SimulatedRanks.Distribute(_x, plan.Tap.Input, ranks, ref _random);
        double[][,] y = SimulatedRanks.PerRank(ranks, rank =>
            Dense.Product(x[rank], Dense.Transpose(SimulatedRanks.Slice(_w, baseWeight, rank, ranks))));
        if (plan.Add.Layout != TensorLayout.Replicated)
        {
            return SimulatedRanks.Assemble(
                SimulatedRanks.PerRank(ranks, rank => Plus(y[rank], bypass[rank])), plan.Add.Layout);
        }

        // After the reduce; the fault adds the copies to the partials instead.
        return fault == PlantedFault.ReplicatedAddedOnEveryRank
            ? SimulatedRanks.Sum(SimulatedRanks.PerRank(ranks, rank => Plus(y[rank], bypass[rank])))
            : Plus(SimulatedRanks.Sum(y), SimulatedRanks.Assemble(bypass, TensorLayout.Replicated));
    }

    /// <summary>Adds the dX of the bypass to that of the base: partial beside a column-parallel linear, else split.</summary>
    private double[,] JoinBaseGradient(BypassPlan plan, double[][,] bypass)
    {
        int ranks = plan.Ranks;
        if (!plan.Tap.InputEverywhere)
        {
            return SimulatedRanks.Assemble(
                SimulatedRanks.PerRank(ranks, rank =>
                    Plus(Dense.Product(_g, SimulatedRanks.Slice(_w, TensorLayout.SplitColumns, rank, ranks)), bypass[rank])),
                TensorLayout.SplitColumns);
        }

        TensorLayout layout = plan.Backward[^1].To;
        return SimulatedRanks.Sum(SimulatedRanks.PerRank(ranks, rank =>
        {
            double[,] fromBase = Dense.Product(
                SimulatedRanks.Slice(_g, TensorLayout.SplitColumns, rank, ranks),
                SimulatedRanks.Slice(_w, TensorLayout.SplitRows, rank, ranks));
            bool isExtraCopy = layout == TensorLayout.Replicated && rank > 0;
            return isExtraCopy
                ? fromBase
                : Plus(fromBase, SimulatedRanks.Embed(bypass[rank], layout, rank, ranks, _x.GetLength(0), _x.GetLength(1)));
        }));
    }

    private static double[,] WeightGradient(
        GradientStep step, ComputeStep linear, double[][,] gradient, double[][,] input, PlantedFault fault)
    {
        double[][,] local = SimulatedRanks.PerRank(gradient.Length, rank =>
            Dense.Product(Dense.Transpose(gradient[rank]), input[rank]));
        if (!step.WeightGradientIsPartial)
        {
            return SimulatedRanks.Assemble(local, linear.Case.Weight!.Value);
        }

        return fault == PlantedFault.WeightGradientsNotSummed ? local[0] : SimulatedRanks.Sum(local);
    }

    private static double[][,] Move(ParallelOperator op, double[][,] local, bool sourceEverywhere, PlantedFault fault) =>
        fault == PlantedFault.AllReduceForgotten && op.Kind == ParallelOperatorKind.AllReduce
            ? local
            : SimulatedRanks.Apply(op, local, sourceEverywhere);

    private double[,]? WeightOf(ComputeStep step, int rank, int ranks) => step.Case.Weight is { } layout
        ? SimulatedRanks.Slice(_weights[step.Operator.Name], layout, rank, ranks)
        : null;

    private static double[,] Forward(BypassOperator op, double[,] input, double[,]? weight) => op.Kind switch
    {
        BypassOperatorKind.Linear => Dense.Product(input, Dense.Transpose(weight!)),
        BypassOperatorKind.ElementwiseNonlinear => Dense.Map(input, input, (x, _) => Math.Max(x, 0)),
        _ => throw new NotSupportedException(),
    };

    private static double[,] Backward(BypassOperator op, double[,] gradient, double[,] input, double[,]? weight) => op.Kind switch
    {
        BypassOperatorKind.Linear => Dense.Product(gradient, weight!),
        BypassOperatorKind.ElementwiseNonlinear => Dense.Map(gradient, input, (g, x) => x > 0 ? g : 0),
        _ => throw new NotSupportedException(),
    };

    private static double[,] Plus(double[,] a, double[,] b) => Dense.Map(a, b, (x, y) => x + y);
}
