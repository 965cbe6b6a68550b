namespace FlexLLM.Graph.Parallelization;

/// <summary>The kinds of operator that a bypass is made of.</summary>
internal enum BypassOperatorKind
{
    Linear,
    ElementwiseNonlinear,
    ElementwiseLinear,
}

/// <summary>An operator of a bypass; widths are elements per token.</summary>
internal sealed record BypassOperator(string Name, BypassOperatorKind Kind, int InputWidth, int OutputWidth)
{
    public IReadOnlyList<OperatorCase> Cases => Kind switch
    {
        BypassOperatorKind.Linear => OperatorRules.Linear,
        BypassOperatorKind.ElementwiseNonlinear => OperatorRules.ElementwiseNonlinear,
        BypassOperatorKind.ElementwiseLinear => OperatorRules.ElementwiseLinear,
        _ => throw new ArgumentOutOfRangeException(nameof(Kind), Kind, "Give the new kind its rules."),
    };
}

/// <summary>f_A of Y = f_B(X) + f_A(X): a chain of operators from one tap to one add, in topological order.</summary>
internal sealed record Bypass(IReadOnlyList<BypassOperator> Operators)
{
    public int InputWidth => Operators[0].InputWidth;

    public int OutputWidth => Operators[^1].OutputWidth;

    /// <summary>u = X A^T, f = u B^T with A (rank, input) and B (output, rank); B carries the scale alpha / rank.</summary>
    public static Bypass Lora(int input, int output, int rank) => Of(
        new("A", BypassOperatorKind.Linear, input, rank),
        new("B", BypassOperatorKind.Linear, rank, output));

    /// <summary>A parallel adapter without biases: a nonlinearity between the two linears.</summary>
    public static Bypass Adapter(int input, int output, int inner) => Of(
        new("D", BypassOperatorKind.Linear, input, inner),
        new("act", BypassOperatorKind.ElementwiseNonlinear, inner, inner),
        new("U", BypassOperatorKind.Linear, inner, output));

    private static Bypass Of(params BypassOperator[] operators)
    {
        foreach (BypassOperator op in operators)
        {
            ArgumentOutOfRangeException.ThrowIfNegativeOrZero(op.InputWidth);
            ArgumentOutOfRangeException.ThrowIfNegativeOrZero(op.OutputWidth);
        }

        return new Bypass(operators);
    }
}

/// <summary>
/// A place in the backbone where f_A may be added: the layout that f_A must have there, and the layout in which the backbone
/// hands the gradient of the sum back.
/// </summary>
internal sealed record AddPoint(string Name, TensorLayout Layout, TensorLayout Gradient);

/// <summary>
/// Where a bypass hangs on the fixed backbone: the layout of X, whether all ranks have X whole, and where to add. If they have,
/// the frozen linear beside the bypass ends its own dX in an all-reduce, which the bypass's dX joins in any layout for free.
/// </summary>
internal sealed record BypassTap(string Name, TensorLayout Input, bool InputEverywhere, IReadOnlyList<AddPoint> AddPoints)
{
    /// <summary>Beside a column-parallel linear (q, k, v, gate, up): the sum is already split like the base output.</summary>
    public static BypassTap ColumnParallel { get; } = new(
        "column-parallel", TensorLayout.Whole, true, [new("add", TensorLayout.SplitColumns, TensorLayout.SplitColumns)]);

    /// <summary>
    /// Beside a row-parallel linear (o, down): into the partials before the base all-reduce, or after it. The gradient is that
    /// of the reduced output, the same on every rank.
    /// </summary>
    public static BypassTap RowParallel { get; } = new(
        "row-parallel", TensorLayout.SplitColumns, false,
        [
            new("add before the reduce", TensorLayout.PreReduce, TensorLayout.Replicated),
            new("add after the reduce", TensorLayout.Replicated, TensorLayout.Replicated),
        ]);
}
