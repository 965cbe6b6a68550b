using System.Text.Json;
using FlexLLM.Graph.Parallelization;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph.Parallelization;

[TestFixture]
internal sealed class PlanReportTests
{
    [Test]
    public void Print_BothTaps_IsTheGoldenText()
    {
        Planning column = Plans.Of(BypassTap.ColumnParallel, Bypass.Lora(4096, 14336, 16), 4, SearchRules.Full);
        Planning row = Plans.Of(BypassTap.RowParallel, Bypass.Lora(14336, 4096, 16), 4);

        Assert.That(PlanReport.Print(column) + "\n" + PlanReport.Print(row), Is.EqualTo(Golden("plans.golden.txt")));
    }

    [Test]
    public void Print_SerialTaps_IsTheGoldenText()
    {
        IEnumerable<string> texts = new[]
        {
            Plans.Of(BypassTap.Replicated, Bypass.SerialAdapter(4096, 64), 4),
            Plans.Of(BypassTap.SplitHidden, Bypass.SerialAdapter(4096, 64), 4),
            Plans.Of(BypassTap.Replicated, Bypass.Scale(4096), 4),
            Plans.Of(BypassTap.SplitHidden, Bypass.Scale(14336), 4),
        }.Select(PlanReport.Print);

        Assert.That(string.Join('\n', texts), Is.EqualTo(Golden("plans.serial.golden.txt")));
    }

    [Test]
    public void Rows_AsJson_SurviveARoundTrip()
    {
        IReadOnlyList<PlanRow> rows = PlanReport.Rows(Plans.Of(BypassTap.RowParallel, Bypass.Lora(14336, 4096, 16), 4));

        PlanRow[]? read = JsonSerializer.Deserialize<PlanRow[]>(JsonSerializer.Serialize(rows));

        Assert.That(read, Is.EqualTo(rows));
        Assert.That(rows.Count(row => row.Verdict == "chosen"), Is.EqualTo(1));
    }

    private static string Golden(string file) => File.ReadAllText(Path.Combine(
        SharedData.RepositoryRoot, "FlexLLM.Core.Tests", "Graph", "Parallelization", file));
}
