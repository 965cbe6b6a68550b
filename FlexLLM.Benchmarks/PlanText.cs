using System.Globalization;
using FlexLLM.Graph;

namespace FlexLLM.Benchmarks;

/// <summary>Numbers and lists of the verb `plan` in words.</summary>
internal static class PlanText
{
    public static string Percent(double share) => Invariant($"{100 * share:0.0} %");

    /// <summary>"gate, up in 20 layers; act in 1 layer".</summary>
    public static string Layers(IEnumerable<RoleSum> roles) => string.Join("; ", roles.GroupBy(r => r.Layers).Select(g =>
        $"{string.Join(", ", g.Select(r => r.Role))} in {g.Key} layer{(g.Key == 1 ? "" : "s")}"));

    public static string Invariant(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);
}
