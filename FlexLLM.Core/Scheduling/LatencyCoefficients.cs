using System.Runtime.CompilerServices;

namespace FlexLLM.Scheduling;

/// <summary>
/// What a step's time is a sum of. RowsTo: the rows of the batch between one knot of the curve and the next, so that the first
/// row stands for reading the weights once, and the time is a curve in rows that bends at the knots.
/// </summary>
internal enum LatencyTerm
{
    /// <summary>Every step.</summary>
    Step,
    RowsTo1,
    RowsTo8,
    RowsTo32,
    RowsTo64,
    RowsTo128,
    RowsTo256,
    RowsTo512,
    RowsTo1024,

    /// <summary>Rows behind the first 1024.</summary>
    RowsBeyond,

    /// <summary>Positions whose keys and values inference reads, once for a sequence.</summary>
    Positions,

    /// <summary>Positions that inference rows attend.</summary>
    Context,

    /// <summary>Once where any row is sampled from: the head's weights are read.</summary>
    Head,
    HeadRow,
    ForwardWindow,

    /// <summary>What a forward row costs beyond a row: saved activations, logits, loss.</summary>
    ForwardRow,
    ForwardContext,

    /// <summary>A backward item: the layer's weights are read.</summary>
    BackwardItem,
    BackwardRowsTo32,
    BackwardRowsTo128,
    BackwardRowsTo512,
    BackwardRowsBeyond,
    BackwardContext,
}

/// <summary>
/// Seconds for each unit of each <see cref="LatencyTerm"/>; none is negative, so more work never predicts less time.
/// </summary>
internal readonly record struct LatencyCoefficients
{
    public const int Count = (int)LatencyTerm.BackwardContext + 1;

    private readonly Terms _values;

    private LatencyCoefficients(Terms values) => _values = values;

    public double this[LatencyTerm term] => _values[(int)term];

    public static LatencyCoefficients From(ReadOnlySpan<double> values)
    {
        Terms terms = default;
        values.CopyTo(terms);
        return new LatencyCoefficients(terms);
    }

    /// <summary>
    /// A machine without curves, on which each row costs the same; ForwardRow is all of a forward row's cost, not less than Row.
    /// </summary>
    public static LatencyCoefficients Linear(
        double step, double row, double context, double forwardWindow, double forwardRow, double forwardContext,
        double backwardItem, double backwardRow, double backwardContext)
    {
        Terms terms = default;
        Span<double> values = terms;
        values[(int)LatencyTerm.Step] = step;
        values[(int)LatencyTerm.RowsTo1..((int)LatencyTerm.RowsBeyond + 1)].Fill(row);
        values[(int)LatencyTerm.Context] = context;
        values[(int)LatencyTerm.ForwardWindow] = forwardWindow;
        values[(int)LatencyTerm.ForwardRow] = Math.Max(0.0, forwardRow - row);
        values[(int)LatencyTerm.ForwardContext] = forwardContext;
        values[(int)LatencyTerm.BackwardItem] = backwardItem;
        values[(int)LatencyTerm.BackwardRowsTo32..((int)LatencyTerm.BackwardRowsBeyond + 1)].Fill(backwardRow);
        values[(int)LatencyTerm.BackwardContext] = backwardContext;
        return new LatencyCoefficients(terms);
    }

    public LatencyCoefficients With(LatencyTerm term, double seconds)
    {
        Terms terms = _values;
        terms[(int)term] = seconds;
        return new LatencyCoefficients(terms);
    }

    /// <summary>Seconds of a step of this size.</summary>
    [SkipLocalsInit]
    public double Dot(in StepFeatures x)
    {
        Span<double> factors = stackalloc double[Count];
        CopyFactors(x, factors);
        double sum = 0.0;
        for (int i = 0; i < factors.Length; i++)
        {
            sum += _values[i] * factors[i];
        }

        return sum;
    }

    public void CopyTo(Span<double> values) => ((ReadOnlySpan<double>)_values).CopyTo(values);

    /// <summary>The factors that the coefficients multiply; the first is 1, and none shrinks when work is added.</summary>
    public static void CopyFactors(in StepFeatures x, Span<double> values)
    {
        values = values[..Count];
        int rows = x.BatchRows;
        values[(int)LatencyTerm.Step] = 1.0;
        values[(int)LatencyTerm.RowsTo1] = Math.Min(rows, 1);
        values[(int)LatencyTerm.RowsTo8] = Math.Clamp(rows - 1, 0, 7);
        values[(int)LatencyTerm.RowsTo32] = Math.Clamp(rows - 8, 0, 24);
        values[(int)LatencyTerm.RowsTo64] = Math.Clamp(rows - 32, 0, 32);
        values[(int)LatencyTerm.RowsTo128] = Math.Clamp(rows - 64, 0, 64);
        values[(int)LatencyTerm.RowsTo256] = Math.Clamp(rows - 128, 0, 128);
        values[(int)LatencyTerm.RowsTo512] = Math.Clamp(rows - 256, 0, 256);
        values[(int)LatencyTerm.RowsTo1024] = Math.Clamp(rows - 512, 0, 512);
        values[(int)LatencyTerm.RowsBeyond] = Math.Max(rows - 1024, 0);
        values[(int)LatencyTerm.Positions] = x.InferencePositions;
        values[(int)LatencyTerm.Context] = x.InferenceContext;
        values[(int)LatencyTerm.Head] = Math.Min(x.SampledRows, 1);
        values[(int)LatencyTerm.HeadRow] = x.SampledRows;
        values[(int)LatencyTerm.ForwardWindow] = x.ForwardWindows;
        values[(int)LatencyTerm.ForwardRow] = x.ForwardRows;
        values[(int)LatencyTerm.ForwardContext] = x.ForwardContext;
        values[(int)LatencyTerm.BackwardItem] = x.BackwardItems;
        values[(int)LatencyTerm.BackwardRowsTo32] = x.BackwardRows - x.BackwardRowsFrom0;
        values[(int)LatencyTerm.BackwardRowsTo128] = x.BackwardRowsFrom0 - x.BackwardRowsFrom1;
        values[(int)LatencyTerm.BackwardRowsTo512] = x.BackwardRowsFrom1 - x.BackwardRowsFrom2;
        values[(int)LatencyTerm.BackwardRowsBeyond] = x.BackwardRowsFrom2;
        values[(int)LatencyTerm.BackwardContext] = x.BackwardContext;
    }

    public bool Equals(LatencyCoefficients other) => ((ReadOnlySpan<double>)_values).SequenceEqual(other._values);

    public override int GetHashCode()
    {
        var hash = default(HashCode);
        foreach (double value in _values)
        {
            hash.Add(value);
        }

        return hash.ToHashCode();
    }

    [InlineArray(Count)]
    private struct Terms
    {
#pragma warning disable IDE0044, IDE0051 // The runtime repeats the one field; nothing names it.
        private double _first;
#pragma warning restore IDE0044, IDE0051
    }
}
