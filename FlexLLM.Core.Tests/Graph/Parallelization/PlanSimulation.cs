using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Graph.Parallelization;

/// <summary>What the simulation can be told to do wrong, to show that its checks notice.</summary>
internal enum PlantedFault
{
    None,
    AllReduceForgotten,
    WeightGradientsNotSummed,
    BiasGradientsNotSummed,
    WholeGradientsSummed,
    ReplicatedAddedOnEveryRank,
    BiasAddedOnEveryRank,
    VectorOfRankZeroOnEveryRank,
    TapGradientNotMoved,
}

/// <summary>Y, dX and the gradient of each parameter by name.</summary>
internal sealed record LayerResult(double[,] Y, double[,] InputGradient, IReadOnlyDictionary<string, double[,]> Gradients)
{
    public double DistanceTo(LayerResult other) => Gradients
        .Select(pair => Dense.Distance(pair.Value, other.Gradients[pair.Key]))
        .Append(Dense.Distance(Y, other.Y))
        .Append(Dense.Distance(InputGradient, other.InputGradient))
        .Max();
}

/// <summary>
/// A bypass beside a frozen linear W, or around nothing on a serial tap, run on one rank (the truth) and on p simulated ranks
/// exactly as a plan says, forward and backward. A rank sees its slices alone. The nonlinearity is ReLU.
/// </summary>
internal sealed class PlanSimulation
{
    private readonly Bypass _bypass;
    private readonly bool _isSerial;
    private readonly double[,] _x;
    private readonly double[,] _w;
    private readonly double[,] _g;
    private readonly Dictionary<string, double[,]> _parameters = [];
    private SeededRandom _random;

    public PlanSimulation(Bypass bypass, int tokens, ulong seed, bool isSerial = false)
    {
        _bypass = bypass;
        _isSerial = isSerial;
        _random = new SeededRandom(seed);
        _x = Dense.Random(tokens, bypass.InputWidth, ref _random);
        _w = isSerial
            ? Dense.Build(bypass.OutputWidth, bypass.InputWidth, (i, j) => i == j ? 1 : 0)
            : Dense.Random(bypass.OutputWidth, bypass.InputWidth, ref _random);
        _g = Dense.Random(tokens, bypass.OutputWidth, ref _random);
        foreach (BypassOperator op in bypass.Operators.Where(o => o.Kind != BypassOperatorKind.ElementwiseNonlinear))
        {
            int rows = op.Kind == BypassOperatorKind.Linear ? op.OutputWidth : 1;
            _parameters[$"{op.Name}.weight"] = Dense.Random(rows, op.InputWidth, ref _random);
            if (op.HasBias)
            {
                _parameters[$"{op.Name}.bias"] = Dense.Random(1, op.OutputWidth, ref _random);
            }
        }
    }

    public LayerResult OnOneRank()
    {
        Stack<(BypassOperator Op, double[,] Input)> done = new();
        double[,] value = _x;
        foreach (BypassOperator op in _bypass.Operators)
        {
            done.Push((op, value));
            value = Operators.Forward(op, value, Parameter(op, "weight"), Parameter(op, "bias"));
        }

        double[,] y = Dense.Plus(Dense.Product(_x, Dense.Transpose(_w)), value);
        Dictionary<string, double[,]> gradients = [];
        double[,] gradient = _g;
        foreach ((BypassOperator op, double[,] input) in done)
        {
            foreach (ParameterKind kind in Enum.GetValues<ParameterKind>().Where(kind => Parameter(op, Name(kind)) is not null))
            {
                gradients[$"{op.Name}.{Name(kind)}"] = Operators.ParameterGradient(op, kind, gradient, input);
            }

            gradient = Operators.Backward(op, gradient, input, Parameter(op, "weight"));
        }

        return new LayerResult(y, Dense.Plus(Dense.Product(_g, _w), gradient), gradients);
    }

    public LayerResult Run(BypassPlan plan, PlantedFault fault = PlantedFault.None)
    {
        Check.That(plan.Tap.IsSerial == _isSerial);
        int ranks = plan.Ranks;
        Dictionary<PlanStep, double[][,]> inputs = new(ReferenceEqualityComparer.Instance);
        double[][,] local = SimulatedRanks.Distribute(_x, plan.Tap.Input, ranks, ref _random);
        foreach (PlanStep step in plan.Forward)
        {
            CheckLocal(local, step.From, step.LocalInputWidth(ranks));
            inputs[step] = local;
            local = step switch
            {
                MoveStep move => Move(move.Operator, local, move.SourceEverywhere, fault),
                ComputeStep compute => SimulatedRanks.PerRank(ranks, rank => Forward(plan, compute, inputs[step], rank, fault)),
                _ => throw new NotSupportedException(),
            };
            CheckLocal(local, step.To, step.LocalOutputWidth(ranks));
        }

        double[,] y = AddToBase(plan, local, fault);
        Dictionary<string, double[,]> gradients = [];
        double[][,] gradient = SimulatedRanks.Distribute(_g, plan.Add.Gradient, ranks, ref _random);
        foreach (GradientStep step in plan.Backward)
        {
            double[][,] g = gradient;
            if (step.Of is ComputeStep compute)
            {
                foreach (PlanParameter parameter in plan.Parameters.Where(p => p.Operator == compute.Operator))
                {
                    gradients[parameter.Name] = Sum(parameter, g, inputs[compute], fault);
                }

                gradient = SimulatedRanks.PerRank(ranks, rank => Operators.Backward(
                    compute.Operator, g[rank], inputs[compute][rank], Held(plan, compute, ParameterKind.Weight, rank, fault)));
            }
            else if (step is { Of: null, Move: { } atTap })
            {
                // The fault leaves the backbone with what each rank happens to have.
                gradient = fault == PlantedFault.TapGradientNotMoved
                    ? SimulatedRanks.PerRank(ranks, rank => Embed(g[rank], step.From, rank, ranks))
                    : Move(atTap, g, sourceEverywhere: false, fault);
            }
            else if (step.Move is { } move)
            {
                gradient = Move(move, g, sourceEverywhere: false, fault);
            }
            else if (step.KeepsShare)
            {
                gradient = SimulatedRanks.PerRank(ranks, rank => SimulatedRanks.Slice(g[rank], step.To, rank, ranks));
            }

            CheckLocal(gradient, step.To, step.To.ColumnsOn(0, ranks, step.Width).Count);
        }

        return new LayerResult(y, JoinBaseGradient(plan, gradient), gradients);
    }

    private double[,] Forward(BypassPlan plan, ComputeStep step, double[][,] input, int rank, PlantedFault fault)
    {
        double[,]? weight = Held(plan, step, ParameterKind.Weight, rank, fault);
        double[,]? bias = Held(plan, step, ParameterKind.Bias, rank, fault);
        bool adds = fault == PlantedFault.BiasAddedOnEveryRank
            || plan.Parameters.Any(p => p.Operator == step.Operator && p.Kind == ParameterKind.Bias && p.IsUsedBy(rank));
        return Operators.Forward(step.Operator, input[rank], weight, adds ? bias : null);
    }

    /// <summary>What a rank holds of a parameter, or null where the operator has none.</summary>
    private double[,]? Held(BypassPlan plan, ComputeStep step, ParameterKind kind, int rank, PlantedFault fault)
    {
        PlanParameter? parameter = plan.Parameters.SingleOrDefault(p => p.Operator == step.Operator && p.Kind == kind);
        if (parameter is null)
        {
            return null;
        }

        bool isVector = step.Operator.Kind == BypassOperatorKind.ElementwiseLinear;
        int owner = isVector && fault == PlantedFault.VectorOfRankZeroOnEveryRank ? 0 : rank;
        (Shard rows, Shard columns) = (parameter.RowsOn(owner, plan.Ranks), parameter.ColumnsOn(owner, plan.Ranks));
        double[,] whole = _parameters[parameter.Name];
        return Dense.Build(rows.Count, columns.Count, (i, j) => whole[rows.Start + i, columns.Start + j]);
    }

    /// <summary>The gradient that the optimizer step sees, put together from all ranks.</summary>
    private static double[,] Sum(PlanParameter parameter, double[][,] gradient, double[][,] input, PlantedFault fault)
    {
        int ranks = gradient.Length;
        double[][,] local = SimulatedRanks.PerRank(ranks, rank =>
            Operators.ParameterGradient(parameter.Operator, parameter.Kind, gradient[rank], input[rank]));
        bool sums = parameter.GradientIsPartial
            ? fault != (parameter.Kind == ParameterKind.Bias
                ? PlantedFault.BiasGradientsNotSummed
                : PlantedFault.WeightGradientsNotSummed)
            : fault == PlantedFault.WholeGradientsSummed;
        Check.That(!parameter.GradientIsPartial || parameter.Layout == TensorLayout.Replicated);
        local = sums ? SimulatedRanks.PerRank(ranks, _ => SimulatedRanks.Sum(local)) : local;
        return SimulatedRanks.Assemble(local, parameter.Layout);
    }

    /// <summary>Y = f_B(X) + f_A(X), where f_B is W, column-parallel or row-parallel as the tap says, or X itself.</summary>
    private double[,] AddToBase(BypassPlan plan, double[][,] bypass, PlantedFault fault)
    {
        int ranks = plan.Ranks;
        if (plan.Tap.IsSerial)
        {
            double[][,] serial = SimulatedRanks.Distribute(_x, plan.Add.Layout, ranks, ref _random);
            return SimulatedRanks.Assemble(
                SimulatedRanks.PerRank(ranks, rank => Dense.Plus(serial[rank], bypass[rank])), plan.Add.Layout);
        }

        TensorLayout baseWeight = plan.Tap.InputEverywhere ? TensorLayout.SplitRows : TensorLayout.SplitColumns;
        double[][,] x = SimulatedRanks.Distribute(_x, plan.Tap.Input, ranks, ref _random);
        double[][,] y = SimulatedRanks.PerRank(ranks, rank =>
            Dense.Product(x[rank], Dense.Transpose(SimulatedRanks.Slice(_w, baseWeight, rank, ranks))));
        if (plan.Add.Layout != TensorLayout.Replicated)
        {
            return SimulatedRanks.Assemble(
                SimulatedRanks.PerRank(ranks, rank => Dense.Plus(y[rank], bypass[rank])), plan.Add.Layout);
        }

        // After the reduce; the fault adds the copies to the partials instead.
        return fault == PlantedFault.ReplicatedAddedOnEveryRank
            ? SimulatedRanks.Sum(SimulatedRanks.PerRank(ranks, rank => Dense.Plus(y[rank], bypass[rank])))
            : Dense.Plus(SimulatedRanks.Sum(y), SimulatedRanks.Assemble(bypass, TensorLayout.Replicated));
    }

    /// <summary>Adds the dX of the bypass to that of the base: partial beside a column-parallel linear, else as the tap says.</summary>
    private double[,] JoinBaseGradient(BypassPlan plan, double[][,] bypass)
    {
        int ranks = plan.Ranks;
        if (plan.Tap.InputGradient is { } wanted)
        {
            Check.That(plan.InputGradient == wanted);
            double[][,] fromBase = SimulatedRanks.Distribute(Dense.Product(_g, _w), wanted, ranks, ref _random);
            return SimulatedRanks.Assemble(
                SimulatedRanks.PerRank(ranks, rank => Dense.Plus(fromBase[rank], bypass[rank])), wanted);
        }

        return SimulatedRanks.Sum(SimulatedRanks.PerRank(ranks, rank =>
        {
            double[,] fromBase = Dense.Product(
                SimulatedRanks.Slice(_g, TensorLayout.SplitColumns, rank, ranks),
                SimulatedRanks.Slice(_w, TensorLayout.SplitRows, rank, ranks));
            bool isExtraCopy = plan.InputGradient == TensorLayout.Replicated && rank > 0;
            return isExtraCopy ? fromBase : Dense.Plus(fromBase, Embed(bypass[rank], plan.InputGradient, rank, ranks));
        }));
    }

    private double[,] Embed(double[,] part, TensorLayout layout, int rank, int ranks) =>
        SimulatedRanks.Embed(part, layout, rank, ranks, _x.GetLength(0), _x.GetLength(1));

    private static double[][,] Move(ParallelOperator op, double[][,] local, bool sourceEverywhere, PlantedFault fault) =>
        fault == PlantedFault.AllReduceForgotten && op.Kind == ParallelOperatorKind.AllReduce
            ? local
            : SimulatedRanks.Apply(op, local, sourceEverywhere);

    /// <summary>Does every rank have as much as the plan says?</summary>
    private void CheckLocal(double[][,] local, TensorLayout layout, int width)
    {
        for (int rank = 0; rank < local.Length; rank++)
        {
            Check.That(local[rank].GetLength(0) == layout.RowsOn(rank, local.Length, _x.GetLength(0)).Count);
            Check.That(local[rank].GetLength(1) == width);
        }
    }

    private double[,]? Parameter(BypassOperator op, string kind) => _parameters.GetValueOrDefault($"{op.Name}.{kind}");

    private static string Name(ParameterKind kind) => kind == ParameterKind.Weight ? "weight" : "bias";

    /// <summary>The arithmetic of one operator on whatever of it a rank has.</summary>
    private static class Operators
    {
        public static double[,] Forward(BypassOperator op, double[,] input, double[,]? weight, double[,]? bias)
        {
            double[,] y = op.Kind switch
            {
                BypassOperatorKind.Linear => Dense.Product(input, Dense.Transpose(weight!)),
                BypassOperatorKind.ElementwiseNonlinear => Dense.Map(input, input, (x, _) => Math.Max(x, 0)),
                BypassOperatorKind.ElementwiseLinear => Dense.Map(input, Repeat(weight!, input), (x, s) => x * s),
                _ => throw new NotSupportedException(),
            };
            return bias is null ? y : Dense.Plus(y, Repeat(bias, y));
        }

        public static double[,] Backward(BypassOperator op, double[,] gradient, double[,] input, double[,]? weight) =>
            op.Kind switch
            {
                BypassOperatorKind.Linear => Dense.Product(gradient, weight!),
                BypassOperatorKind.ElementwiseNonlinear => Dense.Map(gradient, input, (g, x) => x > 0 ? g : 0),
                BypassOperatorKind.ElementwiseLinear => Dense.Map(gradient, Repeat(weight!, gradient), (g, s) => g * s),
                _ => throw new NotSupportedException(),
            };

        public static double[,] ParameterGradient(
            BypassOperator op, ParameterKind kind, double[,] gradient, double[,] input) =>
            (kind, op.Kind) switch
            {
                (ParameterKind.Bias, _) => SumOfRows(gradient),
                (_, BypassOperatorKind.Linear) => Dense.Product(Dense.Transpose(gradient), input),
                (_, BypassOperatorKind.ElementwiseLinear) => SumOfRows(Dense.Map(gradient, input, (g, x) => g * x)),
                _ => throw new NotSupportedException(),
            };

        private static double[,] Repeat(double[,] row, double[,] like)
        {
            Check.That(row.GetLength(0) == 1 && row.GetLength(1) == like.GetLength(1));
            return Dense.Build(like.GetLength(0), like.GetLength(1), (_, j) => row[0, j]);
        }

        private static double[,] SumOfRows(double[,] a) =>
            Dense.Product(Dense.Build(1, a.GetLength(0), (_, _) => 1), a);
    }
}
