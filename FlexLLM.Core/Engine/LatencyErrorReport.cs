namespace FlexLLM.Engine;

/// <summary>How far predictions were off. Errors are shares of the measured time.</summary>
/// <param name="Steps">Steps compared.</param>
/// <param name="Median">Of the error of the expected time.</param>
/// <param name="P95">Its 95th percentile.</param>
/// <param name="P99">Its 99th percentile.</param>
/// <param name="ShareAbove">Share of the steps that took longer than the time most of them should stay under.</param>
internal sealed record LatencyErrorReport(int Steps, double Median, double P95, double P99, double ShareAbove)
{
    public static LatencyErrorReport Of(IReadOnlyList<(TimeSpan Expected, TimeSpan Most, TimeSpan Took)> steps)
    {
        double[] errors = [.. steps.Select(s => Math.Abs((s.Expected / s.Took) - 1.0)).Order()];
        return new LatencyErrorReport(
            steps.Count, At(0.5), At(0.95), At(0.99), steps.Count(s => s.Took > s.Most) / (double)Math.Max(1, steps.Count));

        double At(double share) => errors.Length == 0 ? 0.0 : errors[(int)Math.Ceiling(share * errors.Length) - 1];
    }
}
