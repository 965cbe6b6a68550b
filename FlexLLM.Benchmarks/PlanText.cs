using System.Globalization;
using FlexLLM.Graph;

namespace FlexLLM.Benchmarks;

/// <summary>Numbers and lists of the verb `plan` in words.</summary>
internal static class PlanText
{
    public static string Percent(double share) => Invariant($"{100 * share:0.0} %");

    /// <summary>"gate in 20 layers, up in 19 layers".</summary>
    public static string Layers(IEnumerable<RoleSum> roles) =>
        string.Join(", ", roles.Select(r => $"{r.Role} in {r.Layers} layer{(r.Layers == 1 ? "" : "s")}"));

    public static string Invariant(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);
}
