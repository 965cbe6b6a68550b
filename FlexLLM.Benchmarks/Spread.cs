using System.Text.Json;

namespace FlexLLM.Benchmarks;

/// <summary>Median, least and greatest of some repetitions.</summary>
internal readonly record struct Spread(double Median, double Min, double Max)
{
    public static Spread Of(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        int middle = sorted.Length / 2;
        double median = sorted.Length % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
        return new Spread(median, sorted[0], sorted[^1]);
    }

    /// <summary>Writes {"median", "min", "max"}.</summary>
    public void Write(Utf8JsonWriter json, string name)
    {
        json.WriteStartObject(name);
        json.WriteNumber("median", Median);
        json.WriteNumber("min", Min);
        json.WriteNumber("max", Max);
        json.WriteEndObject();
    }
}
