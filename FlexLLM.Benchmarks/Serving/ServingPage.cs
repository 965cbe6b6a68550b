using System.Text;
using System.Xml;
using System.Xml.Linq;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>
/// A <see cref="ServingReport"/> as one HTML file that is well-formed XML, with its plots inside it: no script, no network, light and
/// dark by the reader's preference.
/// </summary>
internal static class ServingPage
{
    private const int Colours = 12;
    private const int PointsMax = 500;

    public static void Write(ServingReport report, Stream stream)
    {
        // Declared by the meta element: an XML declaration would make old browsers guess.
        var settings = new XmlWriterSettings
        {
            OmitXmlDeclaration = true,
            Encoding = new UTF8Encoding(encoderShouldEmitUTF8Identifier: false),
            NewLineChars = "\n",
        };
        using var writer = XmlWriter.Create(stream, settings);
        writer.WriteRaw("<!DOCTYPE html>\n");
        Page(report).WriteTo(writer);
    }

    private static XElement Page(ServingReport report)
    {
        var body = new XElement("body", new XElement("h1", report.Title));
        foreach (ServingSection section in report.Sections)
        {
            body.Add(Section(section));
        }

        body.Add(Pairs("Settings", report.Settings), Pairs("Machine", report.Machine));
        return new XElement(
            "html", new XAttribute("lang", "en"),
            new XElement(
                "head", new XElement("meta", new XAttribute("charset", "utf-8")),
                new XElement(
                    "meta", new XAttribute("name", "viewport"), new XAttribute("content", "width=device-width, initial-scale=1")),
                new XElement("title", report.Title), new XElement("style", ServingStyle.Sheet)),
            body);
    }

    private static XElement Section(ServingSection section)
    {
        var element = new XElement("section");
        if (section.Title is not null)
        {
            element.Add(new XElement("h2", section.Title));
        }

        if (section.Runs.Count == 0)
        {
            element.Add(new XElement("p", "No run."));
        }

        element.Add(Legend(section), Table(section), section.Notes.Select(note => new XElement("p", note)));
        element.Add(new XElement(
            "div", new XAttribute("class", "charts"),
            AgainstRate(section, ServingFigure.Attainment, "SLO attainment", "requests within both targets, %", 100),
            AgainstRate(section, ServingFigure.TrainedPerSecond, "Finetuning", "trained tokens a second", 1),
            AgainstRate(section, ServingFigure.GeneratedPerSecond, "Inference", "generated tokens a second", 1)));
        foreach (string load in section.Loads)
        {
            element.Add(Load(section, load));
        }

        return element;
    }

    private static XElement Legend(ServingSection section) => new(
        "p", new XAttribute("class", "legend"),
        section.Modes.Select(mode => new XElement(
            "span", new XAttribute("class", Style(section, mode)), new XElement("i", string.Empty), mode)),
        section.References.Count == 0 ? null : new XElement("span", "broken lines: reference"));

    private static XElement Table(ServingSection section)
    {
        string[] heads =
        [
            "Load", "Mode", "Requests/s", "Requests", "Unfinished", "SLO attainment, %", "TTFT mean, ms", "p50", "p99", "TPOT mean, ms",
            "p50", "p99", "Generated tokens/s", "Trained tokens/s", "Kept of the lightest load, %", "Co-serving trains, times",
            "Steps", "With finetuning", "Over budget, %", "Preemptions",
        ];
        var body = new XElement("tbody");
        foreach (string load in section.Loads)
        {
            foreach (ServingRun run in section.Runs.Where(r => r.Load == load))
            {
                body.Add(new XElement("tr", Cells(section, run).Select((text, column) => new XElement("td", text))));
            }
        }

        XElement? references = section.References.Count == 0 ? null : References(section);
        return new XElement(
            "div", new XAttribute("class", "wide"),
            new XElement("table", new XElement("thead", new XElement("tr", heads.Select(head => new XElement("th", head)))), body),
            references);
    }

    private static IEnumerable<string> Cells(ServingSection section, ServingRun run)
    {
        LatencySummary ttft = LatencySummary.Of(run.Requests.Select(r => r.Ttft));
        LatencySummary tpot = LatencySummary.Of(run.Requests.Select(r => r.Tpot));
        ServingRun lightest = section.Runs.Where(r => r.Mode == run.Mode).MinBy(r => r.RequestsPerSecond)!;
        ServingRun? coServing = section.Runs.FirstOrDefault(r => r.Mode == "co-serving" && r.Load == run.Load);
        return
        [
            run.Load, run.Mode, run.RequestsPerSecond.Fixed(2), $"{run.Requests.Count}", $"{ServingReport.Unfinished(run)}",
            ServingReport.AttainmentText(run), ServingReport.Milliseconds(ttft.Mean), ServingReport.Milliseconds(ttft.P50),
            ServingReport.Milliseconds(ttft.P99), ServingReport.Milliseconds(tpot.Mean), ServingReport.Milliseconds(tpot.P50),
            ServingReport.Milliseconds(tpot.P99), run.GeneratedPerSecond.Fixed(1), run.TrainedPerSecond.Fixed(1),
            lightest == run ? "-" : Ratio(100 * run.TrainedPerSecond, lightest.TrainedPerSecond, 1),
            coServing is null || coServing == run ? "-" : Ratio(coServing.TrainedPerSecond, run.TrainedPerSecond, 2),
            $"{run.Steps}", $"{run.FinetuningSteps}", ServingReport.OverBudgetText(run), $"{run.Preemptions}",
        ];
    }

    private static XElement References(ServingSection section)
    {
        var body = new XElement("tbody");
        foreach (ServingReference reference in section.References)
        {
            bool isShare = reference.Figure == ServingFigure.Attainment;
            foreach ((double rate, double value) in reference.Points)
            {
                ServingRun? ours = section.Runs.FirstOrDefault(
                    r => r.Mode == reference.Mode && Math.Abs(r.RequestsPerSecond - rate) <= 0.05 * rate);
                double? measured = ours is null ? null : ValueOf(ours, reference.Figure);
                string[] cells =
                [
                    reference.Name, NameOf(reference.Figure), rate.Fixed(2), Value(value), measured is double v ? Value(v) : "-",
                    measured is double w ? Ratio(w, value, 2) : "-",
                ];
                body.Add(new XElement("tr", cells.Select(text => new XElement("td", text))));
            }

            string Value(double value) => (isShare ? 100 * value : value).Fixed(1);
        }

        string[] heads = ["Reference", "Figure", "Requests/s", "Value", "Ours", "Ours over it"];
        return new XElement(
            "table", new XElement("thead", new XElement("tr", heads.Select(head => new XElement("th", head)))), body);
    }

    private static XElement AgainstRate(ServingSection section, ServingFigure figure, string title, string unit, double factor)
    {
        // Without arrivals there is no attainment; what is trained without them bounds all the rest and is drawn as a level line.
        double rateMax = section.Runs.Select(r => r.RequestsPerSecond).DefaultIfEmpty(1).Max();
        var lines = new List<SvgLine>();
        foreach (string mode in section.Modes)
        {
            ServingRun[] runs = [.. section.Runs.Where(r => r.Mode == mode).OrderBy(r => r.RequestsPerSecond)];
            bool isIdle = runs.Length > 0 && runs.All(r => r.Requests.Count == 0);
            if (runs.Length == 0 || (isIdle && figure != ServingFigure.TrainedPerSecond))
            {
                continue;
            }

            (double X, double Y)[] points = isIdle
                ? [.. new[] { 0, rateMax }.Select(rate => (rate, runs.Average(r => r.TrainedPerSecond)))]
                : [.. runs.Select(r => (r.RequestsPerSecond, factor * ValueOf(r, figure)))];
            lines.Add(new SvgLine(mode, Style(section, mode), points) { HasMarkers = !isIdle });
        }

        foreach (ServingReference reference in section.References.Where(r => r.Figure == figure))
        {
            lines.Add(new SvgLine(
                reference.Name, Style(section, reference.Mode), [.. reference.Points.Select(p => (p.Rate, factor * p.Value))])
            {
                IsDashed = true,
                HasMarkers = true,
            });
        }

        double least = lines.SelectMany(l => l.Points).Select(p => p.Y).DefaultIfEmpty(0).Min();
        bool isShare = figure == ServingFigure.Attainment;
        return new SvgChart($"{title} against load", "arrivals, requests a second", unit)
        {
            Lines = [.. lines.Select(line => Pointing(line, "requests/s"))],
            YMin = isShare ? Math.Min(90, 10 * Math.Floor(least / 10)) : 0,
            YMax = isShare ? 100 : null,
        }.Draw();
    }

    private static IEnumerable<XElement> Load(ServingSection section, string load)
    {
        ServingRun[] runs = [.. section.Runs.Where(r => r.Load == load)];
        double rate = runs.Max(r => r.RequestsPerSecond);
        yield return new XElement("h3", $"Load {load}: {rate.Fixed(2)} requests a second");
        ServingRun[] answered = [.. runs.Where(r => r.Requests.Count > 0)];
        if (answered.Length > 0)
        {
            yield return new XElement(
                "div", new XAttribute("class", "charts"),
                Distribution(section, answered, "Time to first token", r => r.Ttft, answered[0].TtftTarget),
                Distribution(section, answered, "Time per output token", r => r.Tpot, answered[0].TpotTarget));
        }

        ServingRun[] traced = [.. runs.Where(r => r.Series.Count > 0)];
        if (traced.Length == 0)
        {
            yield break;
        }

        double rateMax = traced.SelectMany(r => Rates(r)).Max(p => Math.Max(p.Served, p.Trained));
        yield return new XElement(
            "p", new XAttribute("class", "legend"), "Tokens a second over time:",
            new XElement("span", new XAttribute("class", "served"), new XElement("i", string.Empty), "prompts and answers"),
            new XElement("span", new XAttribute("class", "trained"), new XElement("i", string.Empty), "finetuning"));
        yield return new XElement(
            "div", new XAttribute("class", "charts"), traced.Select(run => OverTime(run, rateMax)));
    }

    // The curve of a mode that leaves requests without an answer does not reach 100 %.
    private static XElement Distribution(
        ServingSection section, ServingRun[] runs, string title, Func<RequestOutcome, double?> timeOf, double target) =>
        new SvgChart(title, "milliseconds", "requests that took at most so long, %")
        {
            Lines =
            [
                .. runs.Select(run =>
                {
                    double[] times = [.. run.Requests.Select(timeOf).OfType<double>().Order()];
                    int count = run.Requests.Count(r => r.AnswerTokens > 1 || timeOf(r) is not null);
                    return new SvgLine(
                        run.Mode, Style(section, run.Mode),
                        [.. Thinned(times.Length).Select(i => (1e3 * times[i], 100.0 * (i + 1) / count))])
                    {
                        IsStepped = true,
                    };
                }),
            ],
            YMax = 100,
            IsXLogarithmic = true,
            Mark = (1e3 * target, $"target {(1e3 * target).Fixed(0)} ms"),
        }.Draw();

    // As many points as a plot has pixels, the first and the last among them.
    private static IEnumerable<int> Thinned(int count) =>
        count <= PointsMax
            ? Enumerable.Range(0, count)
            : Enumerable.Range(0, PointsMax).Select(i => (int)((long)i * (count - 1) / (PointsMax - 1)));

    private static XElement OverTime(ServingRun run, double rateMax)
    {
        (double Time, double Served, double Trained)[] rates = [.. Rates(run)];
        return new SvgChart(run.Mode, "seconds", "tokens a second")
        {
            Lines =
            [
                new SvgLine("prompts and answers", "served", [.. rates.Select(p => (p.Time, p.Served))]) { IsStepped = true },
                new SvgLine("finetuning", "trained", [.. rates.Select(p => (p.Time, p.Trained))]) { IsStepped = true },
            ],
            Width = 340,
            Height = 200,
            YMax = rateMax,
            XMax = run.Seconds,
        }.Draw();
    }

    // Intervals are joined until a chart has about a point for every three of its pixels.
    private static IEnumerable<(double Time, double Served, double Trained)> Rates(ServingRun run)
    {
        int joined = Math.Max(1, (run.Series.Count + 99) / 100);
        ThroughputPoint[][] groups = [.. run.Series.Chunk(joined)];
        for (int i = 0; i < groups.Length; i++)
        {
            double begin = groups[i][0].Time;
            double seconds = (i + 1 < groups.Length ? groups[i + 1][0].Time : run.Seconds) - begin;
            if (seconds > 0)
            {
                yield return (
                    begin, groups[i].Sum(p => p.PromptTokens + p.GeneratedTokens) / seconds, groups[i].Sum(p => p.TrainedTokens) / seconds);
            }
        }
    }

    // A pointed-at line tells its values.
    private static SvgLine Pointing(SvgLine line, string xUnit) => line with
    {
        Name = $"{line.Name}: {string.Join("; ", line.Points.Select(p => $"{p.Y.Fixed(1)} at {p.X.Fixed(2)} {xUnit}"))}",
    };

    private static XElement? Pairs(string title, IReadOnlyList<(string Name, string Value)> pairs) => pairs.Count == 0
        ? null
        : new XElement(
            "details", new XAttribute("open", "open"), new XElement("summary", title),
            new XElement("dl", pairs.Select(p => new[] { new XElement("dt", p.Name), new XElement("dd", p.Value) })));

    private static double ValueOf(ServingRun run, ServingFigure figure) => figure switch
    {
        ServingFigure.Attainment => run.Attainment,
        ServingFigure.TrainedPerSecond => run.TrainedPerSecond,
        _ => run.GeneratedPerSecond,
    };

    private static string NameOf(ServingFigure figure) => figure switch
    {
        ServingFigure.Attainment => "SLO attainment, %",
        ServingFigure.TrainedPerSecond => "trained tokens/s",
        _ => "generated tokens/s",
    };

    private static string Ratio(double value, double reference, int decimals) =>
        reference > 0 ? (value / reference).Fixed(decimals) : "-";

    private static string Style(ServingSection section, string mode) => $"c{section.Modes.ToList().IndexOf(mode) % Colours}";
}
