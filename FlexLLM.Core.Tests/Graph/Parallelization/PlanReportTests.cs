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
        string golden = File.ReadAllText(Path.Combine(
            SharedData.RepositoryRoot, "FlexLLM.Core.Tests", "Graph", "Parallelization", "plans.golden.txt"));

        Planning column = Plans.Of(BypassTap.ColumnParallel, Bypass.Lora(4096, 14336, 16), 4, SearchRules.Full);
        Planning row = Plans.Of(BypassTap.RowParallel, Bypass.Lora(14336, 4096, 16), 4);

        Assert.That(PlanReport.Print(column) + "\n" + PlanReport.Print(row), Is.EqualTo(golden));
    }

    [Test]
    public void Rows_AsJson_SurviveARoundTrip()
    {
        IReadOnlyList<PlanRow> rows = PlanReport.Rows(Plans.Of(BypassTap.RowParallel, Bypass.Lora(14336, 4096, 16), 4));

        PlanRow[]? read = JsonSerializer.Deserialize<PlanRow[]>(JsonSerializer.Serialize(rows));

        Assert.That(read, Is.EqualTo(rows));
        Assert.That(rows.Count(row => row.Verdict == "chosen"), Is.EqualTo(1));
    }
}
