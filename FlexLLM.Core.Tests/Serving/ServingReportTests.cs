using System.Globalization;
using System.Text.Json;
using System.Xml.Linq;
using FlexLLM.Benchmarks.Serving;
using FlexLLM.Tests.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Serving;

/// <summary>The report of the serving verbs in its three forms.</summary>
[TestFixture]
internal sealed class ServingReportTests
{
    private static readonly string[] Modes = ["co-serving", "inference-only", "finetune-only", "temporal-128", "a < b & c"];

    [Test]
    public void WriteHtml_Page_IsWellFormedAndNeedsNothingElse()
    {
        string html = Html(Report());
        XDocument page = XDocument.Parse(html);
        Assert.That(html, Does.StartWith("<!DOCTYPE html>").And.Not.Contain("<script").And.Not.Contain("src="));
        Assert.That(html.Replace(SvgChart.Svg.NamespaceName, "", StringComparison.Ordinal), Does.Not.Contain("http"));
        Assert.That(page.Descendants("style").Single().Value, Does.Not.Contain('>').And.Not.Contain('<').And.Not.Contain('&'));
        foreach (XElement svg in page.Descendants(SvgChart.Svg + "svg"))
        {
            Assert.That(XDocument.Parse(svg.ToString()).Descendants(SvgChart.Svg + "text").Count(), Is.GreaterThan(3));
        }
    }

    [Test]
    public void WriteHtml_Charts_StayInsideTheirFrames()
    {
        foreach (XElement svg in XDocument.Parse(Html(Report())).Descendants(SvgChart.Svg + "svg"))
        {
            double width = Number(svg, "width");
            double height = Number(svg, "height");
            Assert.That(svg.Descendants(SvgChart.Svg + "circle").Select(c => Number(c, "cx")), Is.All.InRange(0, width));
            Assert.That(svg.Descendants(SvgChart.Svg + "circle").Select(c => Number(c, "cy")), Is.All.InRange(0, height));
            Assert.That(svg.ToString(), Does.Not.Contain("NaN").And.Not.Contain("∞").And.Not.Contain("Infinity"));
        }
    }

    [Test]
    public void WriteHtml_Table_HasEveryModeWithItsNumbers()
    {
        ServingReport report = Report();
        XDocument page = XDocument.Parse(Html(report));
        string[][] rows =
        [
            .. page.Descendants("table").First().Descendants("tbody").Single().Elements()
                .Select(row => row.Elements().Select(cell => cell.Value).ToArray()),
        ];
        Assert.That(rows, Has.Length.EqualTo(report.Sections[0].Runs.Count));
        foreach (ServingRun run in report.Sections[0].Runs)
        {
            string[] row = rows.Single(r => r[0] == run.Load && r[1] == run.Mode);
            Assert.That(row[2], Is.EqualTo(run.RequestsPerSecond.Fixed(2)));
            Assert.That(row[5], Is.EqualTo(run.Requests.Count == 0 ? "-" : (100 * run.Attainment).Fixed(1)));
            Assert.That(row[12..14], Is.EqualTo(new[] { run.GeneratedPerSecond.Fixed(1), run.TrainedPerSecond.Fixed(1) }));
        }

        string[] temporal = rows.Single(r => r[0] == "heavy" && r[1] == "temporal-128");
        Assert.That(temporal[15], Is.EqualTo("2.00"), "co-serving trains 20 tokens/s there, temporal-128 10");
    }

    [Test]
    public void WriteHtml_References_StandBesideOurs()
    {
        ServingReport report = Report();
        report = report with
        {
            Sections =
            [
                report.Sections[0] with
                {
                    References = [new ServingReference("co-serving (paper)", "co-serving", ServingFigure.TrainedPerSecond, [(4.0, 40.0)])],
                },
            ],
        };
        XDocument page = XDocument.Parse(Html(report));
        string[] cells = [.. page.Descendants("table").Last().Descendants("td").Select(cell => cell.Value)];
        Assert.That(cells, Is.EqualTo(new[] { "co-serving (paper)", "trained tokens/s", "4.00", "40.0", "20.0", "0.50" }));
        Assert.That(page.Descendants(SvgChart.Svg + "g").Count(g => g.Attribute("class")!.Value.Contains("dashed")), Is.EqualTo(1));
    }

    [Test]
    public void WriteJson_Runs_HaveTheirNumbers()
    {
        using var folder = new TempFolder();
        ServingReport report = Report();
        report.WriteJson(folder["report.json"]);
        using JsonDocument json = JsonDocument.Parse(File.ReadAllText(folder["report.json"]));
        JsonElement[] runs = [.. json.RootElement.GetProperty("runs").EnumerateArray()];
        Assert.That(runs, Has.Length.EqualTo(report.Sections[0].Runs.Count));
        foreach ((JsonElement run, ServingRun expected) in runs.Zip(report.Sections[0].Runs))
        {
            Assert.That(run.GetProperty("mode").GetString(), Is.EqualTo(expected.Mode));
            Assert.That(run.GetProperty("trained_per_second").GetDouble(), Is.EqualTo(expected.TrainedPerSecond));
            Assert.That(run.GetProperty("event_hash").GetString(), Is.EqualTo(expected.EventHash));
            bool isIdle = expected.Requests.Count == 0;
            Assert.That(run.GetProperty("attainment").ValueKind, Is.EqualTo(isIdle ? JsonValueKind.Null : JsonValueKind.Number));
            Assert.That(run.GetProperty("ttft_seconds").ValueKind, Is.EqualTo(isIdle ? JsonValueKind.Null : JsonValueKind.Object));
        }

        Assert.That(json.RootElement.GetProperty("settings").GetProperty("seed").GetString(), Is.EqualTo("1"));
    }

    [Test]
    public void Write_Console_HasALineARun()
    {
        using var text = new StringWriter();
        Report().Write(text);
        string[] lines = text.ToString().Split(Environment.NewLine);
        Assert.That(lines, Has.All.Length.LessThanOrEqualTo(140));
        Assert.That(Modes, Has.All.Matches<string>(mode => lines.Count(line => line.Contains($" {mode} ")) == 2));
    }

    [Test]
    public void Write_NothingAtAll_DoesNotFail()
    {
        var nothing = new ServingReport { Title = "Nothing", Sections = [new ServingSection { Runs = [] }] };
        var noSection = new ServingReport { Title = "Nothing", Sections = [] };
        var failed = nothing with
        {
            Sections = [new ServingSection { Runs = [Run("co-serving", "light", 1, 0) with { Requests = [new(0, 3, 4, null, null, 0)] }] }],
        };
        foreach (ServingReport report in new[] { nothing, noSection, failed })
        {
            using var folder = new TempFolder();
            using var text = new StringWriter();
            report.Write(text);
            report.WriteJson(folder["report.json"]);
            Assert.That(XDocument.Parse(Html(report)).Descendants("h1").Single().Value, Is.EqualTo("Nothing"));
        }
    }

    [Test]
    public void Percentile_BetweenValues_IsLinear()
    {
        Assert.That(LatencySummary.Percentile([1, 2, 4], 0.75), Is.EqualTo(3.0));
        Assert.That(LatencySummary.Of([3.0, null, 1.0]), Is.EqualTo(new LatencySummary(2, 2, 2.98)));
        Assert.That(LatencySummary.Of([]).P99, Is.NaN);
    }

    [Test]
    public void Outcome_MissedTarget_IsNotAttained()
    {
        var good = new RequestOutcome(1.0, 10, 5, 1.5, 1.9, 5);
        Assert.That(good.Attains(0.5, 0.11), Is.True);
        Assert.That(good.Attains(0.4, 0.11), Is.False);
        Assert.That(good.Attains(0.5, 0.09), Is.False);
        Assert.That((good with { TokensGenerated = 4 }).Attains(0.5, 1), Is.False, "the answer is not whole");
        Assert.That((good with { AnswerTokens = 1, TokensGenerated = 1, LastTokenTime = 1.5 }).Attains(0.5, 0.001), Is.True);
    }

    private static ServingReport Report() => new()
    {
        Title = "Serving <tests>",
        Settings = [("seed", "1"), ("trace", "a & b")],
        Machine = [("processors", "2")],
        Sections =
        [
            new ServingSection
            {
                Runs =
                [
                    .. Modes.SelectMany(mode => new[]
                    {
                        Run(mode, "light", 1, mode == "temporal-128" ? 300 : 400),
                        Run(mode, "heavy", 4, mode == "temporal-128" ? 100 : 200),
                    }),
                ],
                Notes = ["A note."],
            },
        ],
    };

    [Test]
    public void OverBudget_OfTheStepsWithFinetuning_IsToldInEveryForm()
    {
        ServingRun run = Run("co-serving", "light", 1, 400);
        ServingRun idle = Run("inference-only", "light", 1, 0) with { FinetuningSteps = 0, StepsOverBudget = 0 };
        ServingReport report = Report() with { Sections = [new ServingSection { Runs = [run, idle] }] };
        using var table = new StringWriter();
        report.Write(table);
        using var folder = new TempFolder();
        report.WriteJson(folder["report.json"]);
        using JsonDocument json = JsonDocument.Parse(File.ReadAllText(folder["report.json"]));
        JsonElement first = json.RootElement.GetProperty("runs")[0];

        Assert.That(run.OverBudget, Is.EqualTo(1 / 80.0), "not of all 100 steps");
        Assert.That(idle.OverBudget, Is.Null);
        Assert.That(ServingRun.Joined([run, run]).OverBudget, Is.EqualTo(run.OverBudget));
        Assert.That(table.ToString(), Does.Contain(" 1.25 ").And.Contain("over %"));
        Assert.That(Html(report), Does.Contain("<td>1.25</td>"));
        Assert.That(first.GetProperty("finetuning_steps").GetInt32(), Is.EqualTo(80));
        Assert.That(first.GetProperty("steps_over_budget").GetInt32(), Is.EqualTo(1));
    }

    private static ServingRun Run(string mode, string load, double rate, long trained) => new()
    {
        Mode = mode,
        Load = load,
        RequestsPerSecond = mode == "finetune-only" ? 0 : rate,
        Seconds = 10,
        TtftTarget = 0.5,
        TpotTarget = 0.1,
        Requests = mode == "finetune-only"
            ? []
            : [.. Enumerable.Range(0, 20).Select(i => new RequestOutcome(i / 2.0, 30, 8, (i / 2.0) + 0.1 + (i / 30.0), (i / 2.0) + 1, 8))],
        TokensGenerated = 160,
        TokensTrained = trained,
        Steps = 100,
        FinetuningSteps = 80,
        StepsOverBudget = 1,
        Preemptions = 0,
        Series = [.. Enumerable.Range(0, 250).Select(i => new ThroughputPoint(i / 25.0, 3, i % 2, 4))],
        EventHash = mode == "co-serving" ? "abc" : null,
    };

    private static string Html(ServingReport report)
    {
        using var folder = new TempFolder();
        report.WriteHtml(folder["report.html"]);
        return File.ReadAllText(folder["report.html"]);
    }

    private static double Number(XElement element, string name) =>
        double.Parse(element.Attribute(name)!.Value, CultureInfo.InvariantCulture);
}
