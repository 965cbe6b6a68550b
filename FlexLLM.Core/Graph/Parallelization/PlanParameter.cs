using FlexLLM.Primitives;

namespace FlexLLM.Graph.Parallelization;

/// <summary>The trainable tensors of an operator.</summary>
internal enum ParameterKind
{
    /// <summary>[OUT, IN] of a linear, [1, n] of a vector.</summary>
    Weight,

    /// <summary>[1, OUT] of a linear.</summary>
    Bias,
}

/// <summary>
/// A trainable tensor as a plan divides it: what each rank holds, adds and updates. Where the gradient is a partial every rank
/// holds a copy, and one all-reduce per optimizer step sums it; in every other case a rank's own gradient is that of the slice or
/// copy that it holds.
/// </summary>
internal sealed record PlanParameter(
    BypassOperator Operator, ParameterKind Kind, TensorLayout Layout, bool GradientIsPartial, bool OnRankZeroOnly = false)
{
    /// <summary>Operator and kind: "A.weight".</summary>
    public string Name => $"{Operator.Name}.{(Kind == ParameterKind.Weight ? "weight" : "bias")}";

    /// <summary>Rows of the undivided tensor.</summary>
    public int Rows => IsMatrix ? Operator.OutputWidth : 1;

    /// <summary>Columns of the undivided tensor.</summary>
    public int Columns => IsMatrix ? Operator.InputWidth : Operator.OutputWidth;

    private bool IsMatrix => Kind == ParameterKind.Weight && Operator.Kind == BypassOperatorKind.Linear;

    public Shard RowsOn(int rank, int ranks) => Layout.RowsOn(rank, ranks, Rows);

    public Shard ColumnsOn(int rank, int ranks) => Layout.ColumnsOn(rank, ranks, Columns);

    /// <summary>Elements that one rank holds. Weights are split evenly or not at all.</summary>
    public double ElementsOnRank(int ranks) => (double)Rows * Columns / (Layout.IsSplit ? ranks : 1);

    /// <summary>Does a rank that holds this also use it? A bias of a partial enters the sum once.</summary>
    public bool IsUsedBy(int rank) => rank == 0 || !OnRankZeroOnly;
}
