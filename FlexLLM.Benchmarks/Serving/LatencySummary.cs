namespace FlexLLM.Benchmarks.Serving;

/// <summary>Mean, median and 99th percentile of times in seconds; NaN where there is none.</summary>
internal readonly record struct LatencySummary(double Mean, double P50, double P99)
{
    /// <summary>Leaves out the times that never came.</summary>
    public static LatencySummary Of(IEnumerable<double?> times)
    {
        double[] sorted = [.. times.OfType<double>().Order()];
        return sorted.Length == 0
            ? new LatencySummary(double.NaN, double.NaN, double.NaN)
            : new LatencySummary(sorted.Average(), Percentile(sorted, 0.5), Percentile(sorted, 0.99));
    }

    /// <summary>Linear between the two nearest of the sorted values.</summary>
    /// <param name="sorted">At least one value, ascending.</param>
    /// <param name="share">0 is the least value, 1 the greatest.</param>
    public static double Percentile(ReadOnlySpan<double> sorted, double share)
    {
        double place = share * (sorted.Length - 1);
        int below = (int)place;
        int above = Math.Min(below + 1, sorted.Length - 1);
        return sorted[below] + ((place - below) * (sorted[above] - sorted[below]));
    }
}
