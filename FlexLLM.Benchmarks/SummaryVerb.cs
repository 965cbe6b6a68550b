using System.Globalization;
using System.Text.Json;

namespace FlexLLM.Benchmarks;

/// <summary>`summary`: one table of what roofline, infer, train and serve wrote into a folder.</summary>
internal static class SummaryVerb
{
    public const string Usage = "--in DIR   (roofline.json, infer.json, train.json, serve.json: those that are there)";

    private static readonly (string File, Func<JsonElement, IEnumerable<SummaryRow>> Rows)[] Parts =
    [
        ("roofline", OfRoofline), ("infer", OfInfer), ("train", OfTrain), ("serve", OfServe),
    ];

    public static int Run(string[] args)
    {
        CommandLine.Allow(args, "--in");
        string folder = CommandLine.Require(args, "--in");
        Write(folder, Console.Out);
        return 0;
    }

    /// <summary>Writes the table of a folder.</summary>
    /// <exception cref="ArgumentException">None of the files is there.</exception>
    /// <exception cref="InvalidFileException">A file is not what the verb of its name writes.</exception>
    public static void Write(string folder, TextWriter output)
    {
        (string Part, SummaryRow Row)[] rows = [.. Parts.SelectMany(part => Read(Path.Combine(folder, part.File + ".json"), part.Rows)
            .Select(row => (part.File, row)))];
        if (rows.Length == 0)
        {
            throw new ArgumentException($"--in: no file of roofline, infer, train or serve is in {folder}.");
        }

        output.WriteLine($"{"",-10}{"figure",-50}{"value",14} {"",-14}{"% of best",9}");
        foreach ((string part, SummaryRow row) in rows)
        {
            string share = row.Share is double s ? (100 * s).ToString("0.0", CultureInfo.InvariantCulture) : "";
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture, $"{part,-10}{row.Figure,-50}{row.Value,14:0.0} {row.Unit,-14}{share,9} {row.Bound}"));
        }
    }

    private static IEnumerable<SummaryRow> Read(string file, Func<JsonElement, IEnumerable<SummaryRow>> rows)
    {
        if (!File.Exists(file))
        {
            return [];
        }

        try
        {
            using JsonDocument document = JsonDocument.Parse(File.ReadAllBytes(file));
            return [.. rows(document.RootElement)];
        }
        catch (Exception e) when (e is JsonException or KeyNotFoundException or InvalidOperationException or FormatException)
        {
            throw new InvalidFileException(file, "contents", "are not what the verb writes: " + e.Message);
        }
    }

    private static IEnumerable<SummaryRow> OfRoofline(JsonElement json)
    {
        foreach (JsonElement r in json.GetProperty("results").EnumerateArray())
        {
            bool isCopy = Text(r, "unit") == "bytes";
            double best = Number(r.GetProperty("per_second"), "max");
            yield return new SummaryRow(Text(r, "name"), best / 1e9, isCopy ? "GB/s" : "GFLOP/s");
        }

        foreach (JsonElement calls in json.GetProperty("calls").EnumerateArray())
        {
            // Of several bounds the first: the device's own, where it is one that such a model is served on.
            JsonElement share = calls.GetProperty("shares")[0];
            yield return new SummaryRow(
                $"calls of a decode step, {Text(calls, "shape")}, batch {calls.GetProperty("rows").GetInt32()}" +
                    $", adapters {calls.GetProperty("adapters").GetInt32()}",
                1e3 * Number(calls.GetProperty("called_seconds"), "median"), "ms", Number(share, "share"),
                $"reading the weights at {Text(share, "of")}");
        }
    }

    private static IEnumerable<SummaryRow> OfInfer(JsonElement json) => json.GetProperty("results").EnumerateArray().Select(r =>
        new SummaryRow(
            Text(r, "work"), Number(r.GetProperty("tokens_per_second"), "median"), "tokens/s", Number(r, "share_of_bound"),
            Text(r, "bound")));

    private static IEnumerable<SummaryRow> OfTrain(JsonElement json)
    {
        JsonElement speeds = json.GetProperty("tokens_per_second");
        yield return new SummaryRow(
            $"LoRA step, {json.GetProperty("tokens").GetInt32()} tokens", Number(speeds.GetProperty("step"), "median"), "tokens/s",
            Number(json, "share_of_bound"), Text(json, "bound"));
        foreach (string part in new[] { "forward and loss", "backward", "optimizer" })
        {
            yield return new SummaryRow($"  {part}", Number(speeds.GetProperty(part), "median"), "tokens/s");
        }
    }

    private static IEnumerable<SummaryRow> OfServe(JsonElement json)
    {
        double? alone = json.GetProperty("runs").EnumerateArray().Where(run => Text(run, "mode") == "finetune-only")
            .Select(run => (double?)Number(run, "trained_per_second")).FirstOrDefault();
        foreach (JsonElement run in json.GetProperty("runs").EnumerateArray())
        {
            string name = $"{Text(run, "mode")}, {Text(run, "load")}";
            yield return new SummaryRow(
                $"{name}: finetuning", Number(run, "trained_per_second"), "tokens/s", Number(run, "share_of_matrix_rate"),
                "matrix, all tokens");
            if (run.GetProperty("attainment").ValueKind != JsonValueKind.Number)
            {
                continue;
            }

            if (alone is double speed && Text(run, "mode") != "inference-only")
            {
                yield return new SummaryRow($"{name}: kept of finetune-only", 100 * Number(run, "trained_per_second") / speed, "%");
            }

            yield return new SummaryRow(
                $"{name}: inference", Number(run, "generated_per_second"), "tokens/s", Number(run, "share_of_copy_bandwidth"),
                "copy, weights once a step");
            yield return new SummaryRow($"{name}: attained", 100 * Number(run, "attainment"), "% of requests");
            foreach ((string figure, string field) in new[] { ("TTFT", "ttft_seconds"), ("TPOT", "tpot_seconds") })
            {
                if (run.GetProperty(field) is { ValueKind: JsonValueKind.Object } times)
                {
                    yield return new SummaryRow($"{name}: {figure} mean", 1e3 * Number(times, "mean"), "ms");
                    yield return new SummaryRow($"{name}: {figure} p99", 1e3 * Number(times, "p99"), "ms");
                }
            }
        }
    }

    private static string Text(JsonElement json, string name) => json.GetProperty(name).GetString() ?? "";

    private static double Number(JsonElement json, string name) => json.GetProperty(name).GetDouble();

    /// <summary>A line of the table.</summary>
    private sealed record SummaryRow(string Figure, double Value, string Unit, double? Share = null, string Bound = "");
}
