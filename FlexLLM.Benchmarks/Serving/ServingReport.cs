using System.Globalization;
using System.Text.Json;
using FlexLLM.Formats;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>A figure of a run that is plotted against the rate of arrivals.</summary>
internal enum ServingFigure
{
    /// <summary>Share of requests within both targets, 0 to 1.</summary>
    Attainment,

    /// <summary>Finetuning tokens a second.</summary>
    TrainedPerSecond,

    /// <summary>Generated tokens a second.</summary>
    GeneratedPerSecond,
}

/// <summary>Somebody else's figures to show beside ours, such as the paper's.</summary>
/// <param name="Name">Such as "co-serving (paper)".</param>
/// <param name="Mode">The mode of ours that it compares with, whose colour it takes.</param>
/// <param name="Figure">What the values are.</param>
/// <param name="Points">Arrivals a second, ascending, each with a value.</param>
internal sealed record ServingReference(
    string Name, string Mode, ServingFigure Figure, IReadOnlyList<(double Rate, double Value)> Points);

/// <summary>Runs that are compared with each other: one model on one machine.</summary>
internal sealed record ServingSection
{
    /// <summary>Such as "Llama-3.1-8B, 4 pipelines", or null where a report has one section.</summary>
    public string? Title { get; init; }

    public required IReadOnlyList<ServingRun> Runs { get; init; }

    public IReadOnlyList<ServingReference> References { get; init; } = [];

    /// <summary>What a reader must know to judge the figures, a sentence or two each.</summary>
    public IReadOnlyList<string> Notes { get; init; } = [];

    /// <summary>
    /// What inference alone leaves: finetuning tokens a second of a machine that trains at the speed of finetuning alone whenever
    /// inference alone would wait. A mode has more where requests take longer, so that more of them share a pass over the weights.
    /// Null where one of the two was not measured.
    /// </summary>
    public double? TrainingLeftOver(string load)
    {
        ServingRun? alone = Runs.FirstOrDefault(r => r.Mode == "finetune-only");
        ServingRun? inference = Runs.FirstOrDefault(r => r.Mode == "inference-only" && r.Load == load);
        return inference?.BusySeconds is double busy ? alone?.TrainedPerSecond * (1 - (busy / inference.Seconds)) : null;
    }

    /// <summary>Modes in the order in which they are to be shown.</summary>
    public IReadOnlyList<string> Modes => [.. Runs.Select(r => r.Mode).Concat(References.Select(r => r.Mode)).Distinct()];

    /// <summary>Loads in the order of their rates; a run without requests belongs to a load like any other.</summary>
    public IReadOnlyList<string> Loads =>
        [.. Runs.GroupBy(r => r.Load).OrderBy(g => g.Max(r => r.RequestsPerSecond)).Select(g => g.Key)];
}

/// <summary>
/// What the serving verbs report: a table for the console, a JSON file, and a web page with plots (<see cref="ServingPage"/>).
/// </summary>
internal sealed record ServingReport
{
    public required string Title { get; init; }

    /// <summary>What was run.</summary>
    public IReadOnlyList<(string Name, string Value)> Settings { get; init; } = [];

    /// <summary>What it was run on.</summary>
    public IReadOnlyList<(string Name, string Value)> Machine { get; init; } = [];

    public required IReadOnlyList<ServingSection> Sections { get; init; }

    /// <summary>What tokens cost and what the device does at best; null for a simulation.</summary>
    public ServingCosts? Costs { get; init; }

    /// <summary>Writes the table of all runs.</summary>
    public void Write(TextWriter output)
    {
        foreach (ServingSection section in Sections)
        {
            if (section.Title is not null)
            {
                output.WriteLine(section.Title);
            }

            output.WriteLine(
                $"{"",-28}{"",6}{"attained",9}{"TTFT ms",25}{"",8}{"TPOT ms",17}{"generated",18}" +
                $"{"trained",8}{"over %",7}{"left",8}{"of it",6}");
            output.WriteLine(
                $"{"load",-11}{"mode",-17}{"req/s",6}{"%",9}{"mean",9}{"p50",8}{"p99",8}" +
                $"{"mean",9}{"p50",8}{"p99",8}{"tok/s",10}{"tok/s",8}{"budget",7}{"tok/s",8}{"%",6}");
            foreach (ServingRun run in section.Runs)
            {
                LatencySummary ttft = LatencySummary.Of(run.Requests.Select(r => r.Ttft));
                LatencySummary tpot = LatencySummary.Of(run.Requests.Select(r => r.Tpot));
                double? left = section.TrainingLeftOver(run.Load);
                output.WriteLine(
                    $"{run.Load,-11}{run.Mode,-17}{run.RequestsPerSecond.Fixed(2),6}{AttainmentText(run),9}" +
                    $"{Milliseconds(ttft.Mean),9}{Milliseconds(ttft.P50),8}{Milliseconds(ttft.P99),8}" +
                    $"{Milliseconds(tpot.Mean),9}{Milliseconds(tpot.P50),8}{Milliseconds(tpot.P99),8}" +
                    $"{run.GeneratedPerSecond.Fixed(1),10}{run.TrainedPerSecond.Fixed(1),8}{OverBudgetText(run),7}" +
                    $"{left?.Fixed(1) ?? "-",8}{(100 * run.TrainedPerSecond / left)?.Fixed(0) ?? "-",6}");
            }

            foreach (string note in section.Notes)
            {
                output.WriteLine(note);
            }

            Costs?.Write(output, section.Runs);
        }
    }

    /// <summary>Writes one JSON object: settings, machine, and an array with an object for every run.</summary>
    public void WriteJson(string file) => AtomicFile.WriteJson(file, json =>
    {
        json.WriteStartObject();
        json.WriteString("title", Title);
        WritePairs(json, "settings", Settings);
        WritePairs(json, "machine", Machine);
        Costs?.Write(json);
        json.WriteStartArray("runs");
        foreach (ServingSection section in Sections)
        {
            foreach (ServingRun run in section.Runs)
            {
                WriteRun(json, section, run, Costs);
            }
        }

        json.WriteEndArray();
        json.WriteStartArray("references");
        foreach (ServingSection section in Sections)
        {
            foreach (ServingReference reference in section.References)
            {
                WriteReference(json, section, reference);
            }
        }

        json.WriteEndArray();
        json.WriteStartArray("notes");
        foreach (string note in Sections.SelectMany(s => s.Notes))
        {
            json.WriteStringValue(note);
        }

        json.WriteEndArray();
        json.WriteEndObject();
    });

    /// <summary>Writes a web page that needs nothing else.</summary>
    public void WriteHtml(string file) => AtomicFile.Write(file, stream => ServingPage.Write(this, stream));

    /// <summary>Writes the files that are asked for.</summary>
    public void Save(string? jsonFile, string? htmlFile)
    {
        if (jsonFile is not null)
        {
            WriteJson(jsonFile);
        }

        if (htmlFile is not null)
        {
            WriteHtml(htmlFile);
        }
    }

    /// <summary>In percent; a dash where nothing arrived.</summary>
    public static string AttainmentText(ServingRun run) => run.Requests.Count == 0 ? "-" : (100 * run.Attainment).Fixed(1);

    /// <summary>Of the steps with finetuning, in percent; a dash where there was none.</summary>
    public static string OverBudgetText(ServingRun run) => (100 * run.OverBudget)?.Fixed(2) ?? "-";

    /// <summary>Seconds as milliseconds; a dash where there is no value.</summary>
    public static string Milliseconds(double seconds) => double.IsNaN(seconds) ? "-" : (1e3 * seconds).Fixed(1);

    /// <summary>The requests whose answers did not come to their ends.</summary>
    public static int Unfinished(ServingRun run) => run.Requests.Count(r => r.TokensGenerated < r.AnswerTokens);

    private static void WriteRun(Utf8JsonWriter json, ServingSection section, ServingRun run, ServingCosts? costs)
    {
        json.WriteStartObject();
        if (section.Title is not null)
        {
            json.WriteString("section", section.Title);
        }

        json.WriteString("mode", run.Mode);
        json.WriteString("load", run.Load);
        json.WriteNumber("requests_per_second", run.RequestsPerSecond);
        json.WriteNumber("seconds", run.Seconds);
        json.WriteNumber("requests", run.Requests.Count);
        json.WriteNumber("requests_unfinished", Unfinished(run));
        json.WriteNumber("ttft_target_seconds", run.TtftTarget);
        json.WriteNumber("tpot_target_seconds", run.TpotTarget);
        if (run.Requests.Count == 0)
        {
            json.WriteNull("attainment");
        }
        else
        {
            json.WriteNumber("attainment", run.Attainment);
        }

        WriteLatency(json, "ttft_seconds", run.Requests.Select(r => r.Ttft));
        WriteLatency(json, "tpot_seconds", run.Requests.Select(r => r.Tpot));
        json.WriteNumber("tokens_generated", run.TokensGenerated);
        json.WriteNumber("tokens_trained", run.TokensTrained);
        json.WriteNumber("generated_per_second", run.GeneratedPerSecond);
        json.WriteNumber("trained_per_second", run.TrainedPerSecond);
        json.WriteNumber("steps", run.Steps);
        json.WriteNumber("finetuning_steps", run.FinetuningSteps);
        json.WriteNumber("steps_over_budget", run.StepsOverBudget);
        json.WriteNumber("preemptions", run.Preemptions);
        if (run.BusySeconds is double busy)
        {
            json.WriteNumber("busy_seconds", busy);
        }

        if (section.TrainingLeftOver(run.Load) is double left)
        {
            json.WriteNumber("trained_per_second_left_over", left);
        }

        if (costs is not null)
        {
            json.WriteNumber("share_of_matrix_rate", costs.ShareOfMatrix(run));
            json.WriteNumber("share_of_copy_bandwidth", costs.ShareOfCopy(run));
        }

        json.WriteString("event_hash", run.EventHash);
        json.WriteEndObject();
    }

    private static void WriteLatency(Utf8JsonWriter json, string name, IEnumerable<double?> times)
    {
        LatencySummary summary = LatencySummary.Of(times);
        if (double.IsNaN(summary.Mean))
        {
            json.WriteNull(name);
            return;
        }

        json.WriteStartObject(name);
        json.WriteNumber("mean", summary.Mean);
        json.WriteNumber("p50", summary.P50);
        json.WriteNumber("p99", summary.P99);
        json.WriteEndObject();
    }

    private static void WriteReference(Utf8JsonWriter json, ServingSection section, ServingReference reference)
    {
        json.WriteStartObject();
        if (section.Title is not null)
        {
            json.WriteString("section", section.Title);
        }

        json.WriteString("name", reference.Name);
        json.WriteString("mode", reference.Mode);
        json.WriteString("figure", reference.Figure.ToString());
        json.WriteStartArray("points");
        foreach ((double rate, double value) in reference.Points)
        {
            json.WriteStartObject();
            json.WriteNumber("requests_per_second", rate);
            json.WriteNumber("value", value);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteEndObject();
    }

    private static void WritePairs(Utf8JsonWriter json, string name, IReadOnlyList<(string Name, string Value)> pairs)
    {
        json.WriteStartObject(name);
        foreach ((string key, string value) in pairs)
        {
            json.WriteString(key, value);
        }

        json.WriteEndObject();
    }
}

/// <summary>Numbers as text that is the same in every culture.</summary>
internal static class ReportText
{
    /// <summary>With a fixed number of decimals.</summary>
    public static string Fixed(this double value, int decimals) =>
        value.ToString("F" + decimals.ToString(CultureInfo.InvariantCulture), CultureInfo.InvariantCulture);
}
