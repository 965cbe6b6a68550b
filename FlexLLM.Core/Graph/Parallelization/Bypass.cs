using FlexLLM.Primitives;

namespace FlexLLM.Graph.Parallelization;

/// <summary>The kinds of operator that a bypass is made of.</summary>
internal enum BypassOperatorKind
{
    /// <summary>X W^T, with a bias where the operator has one.</summary>
    Linear,

    /// <summary>An activation function. Nothing to train.</summary>
    ElementwiseNonlinear,

    /// <summary>Each column times its element of a trainable vector.</summary>
    ElementwiseLinear,
}

/// <summary>An operator of a bypass; widths are elements per token. Only a linear may have a bias.</summary>
internal sealed record BypassOperator(
    string Name, BypassOperatorKind Kind, int InputWidth, int OutputWidth, bool HasBias = false)
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

    /// <summary>A serial adapter: X + act(X D^T + d) U^T + u, on a tap where X itself is what f is added to.</summary>
    public static Bypass SerialAdapter(int width, int inner) => Of(
        new("D", BypassOperatorKind.Linear, width, inner, HasBias: true),
        new("act", BypassOperatorKind.ElementwiseNonlinear, inner, inner),
        new("U", BypassOperatorKind.Linear, inner, width, HasBias: true));

    /// <summary>(IA)^3: X + X * s, where s is the learned scale minus one, so that it begins as zero like every bypass.</summary>
    public static Bypass Scale(int width) => Of(new BypassOperator("s", BypassOperatorKind.ElementwiseLinear, width, width));

    private static Bypass Of(params BypassOperator[] operators)
    {
        foreach (BypassOperator op in operators)
        {
            ArgumentOutOfRangeException.ThrowIfNegativeOrZero(op.InputWidth);
            ArgumentOutOfRangeException.ThrowIfNegativeOrZero(op.OutputWidth);
            Check.That(op.Kind == BypassOperatorKind.Linear || (op.InputWidth == op.OutputWidth && !op.HasBias));
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
/// Where a bypass hangs on the fixed backbone: the layout of X, whether all ranks have X whole, in which layout the backbone
/// takes dX of the bypass, and where to add. No layout for dX means that the frozen linear beside the bypass ends its own dX
/// in an all-reduce, which the bypass's dX joins in any layout for free. On a serial tap there is no linear beside the bypass:
/// f is added to X itself. The symbol begins the names of its plans.
/// </summary>
internal sealed record BypassTap(
    string Name,
    char Symbol,
    TensorLayout Input,
    bool InputEverywhere,
    TensorLayout? InputGradient,
    bool IsSerial,
    IReadOnlyList<AddPoint> AddPoints)
{
    /// <summary>Beside a column-parallel linear (q, k, v, gate, up): the sum is already split like the base output.</summary>
    public static BypassTap ColumnParallel { get; } = new(
        "column-parallel", 'C', TensorLayout.Whole, true, null, false,
        [new("add", TensorLayout.SplitColumns, TensorLayout.SplitColumns)]);

    /// <summary>
    /// Beside a row-parallel linear (o, down): into the partials before the base all-reduce, or after it. The gradient is that
    /// of the reduced output, the same on every rank.
    /// </summary>
    public static BypassTap RowParallel { get; } = new(
        "row-parallel", 'R', TensorLayout.SplitColumns, false, TensorLayout.SplitColumns, false,
        [
            new("add before the reduce", TensorLayout.PreReduce, TensorLayout.Replicated),
            new("add after the reduce", TensorLayout.Replicated, TensorLayout.Replicated),
        ]);

    /// <summary>
    /// On the output of a row-parallel linear (o, down) after its all-reduce: full copies of X, of the sum and of its gradient. The
    /// frozen linear before takes a full dX too and reduces nothing, so the bypass must end its own dX with copies.
    /// </summary>
    public static BypassTap Replicated { get; } = new(
        "replicated", 'F', TensorLayout.Whole, true, TensorLayout.Replicated, true,
        [new("add", TensorLayout.Replicated, TensorLayout.Replicated)]);

    /// <summary>On the output of k or v, or on the input of down: X, the sum and both gradients are split by columns.</summary>
    public static BypassTap SplitHidden { get; } = new(
        "split-hidden", 'H', TensorLayout.SplitColumns, false, TensorLayout.SplitColumns, true,
        [new("add", TensorLayout.SplitColumns, TensorLayout.SplitColumns)]);

    /// <summary>Every tap that there is.</summary>
    public static IReadOnlyList<BypassTap> All { get; } = [ColumnParallel, RowParallel, Replicated, SplitHidden];
}
