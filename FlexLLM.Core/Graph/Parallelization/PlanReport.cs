using System.Globalization;
using System.Text;

namespace FlexLLM.Graph.Parallelization;

/// <summary>A plan as one flat row of plain values, for text and for JSON. Elements and flops are per token and rank.</summary>
internal sealed record PlanRow(
    string Name,
    string Steps,
    double WeightsPerRank,
    double ForwardFlops,
    double ForwardElementsSent,
    double BackwardElementsSent,
    double StepElementsReduced,
    double ForwardMicroseconds,
    double BackwardMicroseconds,
    double StepMicroseconds,
    double TotalMicroseconds,
    double MemoryBytes,
    string Verdict);

/// <summary>Text for the compiler's report: what was asked, then a line a plan.</summary>
internal static class PlanReport
{
    private const string Header =
        "  weights    flops/tok  sent/tok  back/tok     step  forward us  backward us   step us   total us  verdict";

    public static IReadOnlyList<PlanRow> Rows(Planning planning) => [.. planning.Plans.Select(entry => new PlanRow(
        entry.Name,
        entry.Plan.ToString(),
        entry.Demand.Weights,
        entry.Demand.ForwardFlops,
        entry.Demand.ForwardSent,
        entry.Demand.BackwardSent,
        entry.Demand.StepReduced,
        entry.Cost.ForwardSeconds * 1e6,
        entry.Cost.BackwardSeconds * 1e6,
        entry.Cost.StepSeconds * 1e6,
        entry.Cost.TotalSeconds * 1e6,
        entry.Cost.MemoryBytes,
        Verdict(entry, planning.Choice)))];

    public static string Print(Planning planning)
    {
        IEnumerable<string> widths = planning.Bypass.Operators.Select(Shape);
        string work = planning.Tokens.Training ? $"{planning.Tokens.PerStep} a step" : "serving only";
        StringBuilder text = new();
        text.Append(CultureInfo.InvariantCulture,
            $"{planning.Tap.Name} {string.Join(", ", widths)}; {planning.Ranks} ranks; ");
        text.Append(CultureInfo.InvariantCulture, $"{planning.Tokens.PerBatch} tokens a batch, {work}\n");
        IReadOnlyList<PlanRow> rows = Rows(planning);
        int nameWidth = Math.Max(6, rows.Max(row => row.Name.Length));
        int verdictWidth = Math.Max(19, rows.Max(row => row.Verdict.Length));
        text.Append("plan".PadRight(nameWidth)).Append(Header).Append('\n');
        foreach (PlanRow row in rows)
        {
            text.Append(row.Name.PadRight(nameWidth)).Append(CultureInfo.InvariantCulture,
                $" {row.WeightsPerRank,8:0} {row.ForwardFlops,12:0} {row.ForwardElementsSent,9:0.##}");
            text.Append(CultureInfo.InvariantCulture,
                $" {row.BackwardElementsSent,9:0.##} {row.StepElementsReduced,8:0}");
            text.Append(CultureInfo.InvariantCulture,
                $" {row.ForwardMicroseconds,11:0.00} {row.BackwardMicroseconds,12:0.00} {row.StepMicroseconds,9:0.00}");
            text.Append(CultureInfo.InvariantCulture,
                $" {row.TotalMicroseconds,10:0.00}  {row.Verdict.PadRight(verdictWidth)}  {row.Steps}\n");
        }

        return text.ToString();
    }

    private static string Shape(BypassOperator op) => op.Kind == BypassOperatorKind.Linear
        ? $"{op.Name} {op.InputWidth}x{op.OutputWidth}{(op.HasBias ? "+bias" : "")}"
        : $"{op.Name} {op.OutputWidth}";

    private static string Verdict(PlanEntry entry, PlanEntry? choice) => entry switch
    {
        { DominatedBy: string by } => $"dominated by {by}",
        { Fits: false } => "does not fit",
        _ when entry == choice => "chosen",
        _ => "slower",
    };
}
