using System.Globalization;
using FlexLLM.Engine;
using FlexLLM.Formats;
using FlexLLM.Models;
using FlexLLM.Scheduling;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `latency`: profiles a model on this machine as an engine does when it loads, prints the coefficients, and compares
/// predictions with random mixed steps that the profile never saw. Its JSON is a profile that `simulate --profile` takes.
/// </summary>
internal static class LatencyVerb
{
    public const string Usage =
        BenchModel.Usage + " [--steps 200] [--time-ms N] [--context 2048] [--seed 1] [--json FILE]";

    public static int Run(string[] args) => Run(args, Console.Out);

    public static int Run(string[] args, TextWriter output)
    {
        CommandLine.Allow(args, [.. BenchModel.Options, "--steps", "--time-ms", "--context", "--seed", "--json"]);
        ModelChoice choice = ModelChoice.Parse(args);
        int steps = CommandLine.Int(args, "--steps", 200, min: 1);
        ulong seed = (ulong)CommandLine.Int(args, "--seed", 1, min: 0);
        string? file = CommandLine.Text(args, "--json");
        var options = new CoServingOptions
        {
            Device = BenchDevice.Create(DeviceChoice.Parse(args), CommandLine.Int(args, "--threads", 2, min: 1)),
            WeightType = CommandLine.WeightType(args, "--weights"),
            ContextTokensMax = CommandLine.Int(args, "--context", 2048, min: 64),
            ProfilingTimeMax = CommandLine.Number(args, "--time-ms") is double time ? TimeSpan.FromMilliseconds(time) : null,
        };
        (LatencyModel model, LatencyErrorReport profiled, LatencyErrorReport learning) =
            MeasureAsync(choice, options, steps, seed).GetAwaiter().GetResult();
        string profiling = options.ProfilingTimeMax is TimeSpan most ? $"{most.TotalMilliseconds:0} ms" : "the default time";
        Print(output, $"{choice.Name}, {profiling} of profiling", model, profiled, learning);
        if (file is not null)
        {
            Save(file, choice.Name, model, profiled, learning);
        }

        return 0;
    }

    private static async Task<(LatencyModel Model, LatencyErrorReport Profiled, LatencyErrorReport Learning)> MeasureAsync(
        ModelChoice choice, CoServingOptions options, int steps, ulong seed)
    {
        using RandomWeights? random = choice.Weights(options.WeightType);
        await using CoServingEngine engine = await choice.StartAsync(random, options).ConfigureAwait(false);
        return await engine.CallAsync(
            loop =>
            {
                var heldOut = new HeldOutSteps(loop.Timer());
                return (loop.Latency, heldOut.Measure(loop.Latency, steps, seed, learns: false),
                    heldOut.Measure(loop.Latency, steps, seed + 1, learns: true));
            },
            CancellationToken.None).ConfigureAwait(false);
    }

    private static void Print(
        TextWriter output, string title, in LatencyModel model, LatencyErrorReport profiled, LatencyErrorReport learning)
    {
        output.WriteLine(title);
        foreach (LatencyTerm term in Enum.GetValues<LatencyTerm>())
        {
            output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{term,-20}{model.Coefficients[term] * 1e6,14:0.0000} us"));
        }

        output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{"tail",-20}{model.Tail,14:0.00}"));
        output.WriteLine($"{"held-out steps",-20}{"median",10}{"p95",10}{"p99",10}{"above",10}");
        foreach ((string kind, LatencyErrorReport r) in new[] { ("as profiled", profiled), ("learning", learning) })
        {
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture, $"{kind,-20}{r.Median,10:P1}{r.P95,10:P1}{r.P99,10:P1}{r.ShareAbove,10:P1}"));
        }
    }

    private static void Save(
        string file, string model, LatencyModel profile, LatencyErrorReport profiled, LatencyErrorReport learning) =>
        AtomicFile.WriteJson(file, json =>
        {
            json.WriteStartObject();
            json.WriteString("model", model);
            LatencyProfileFile.WriteModel(json, profile);
            foreach ((string kind, LatencyErrorReport r) in new[] { ("as_profiled", profiled), ("learning", learning) })
            {
                json.WriteStartObject(kind);
                json.WriteNumber("steps", r.Steps);
                json.WriteNumber("error_median", r.Median);
                json.WriteNumber("error_p95", r.P95);
                json.WriteNumber("error_p99", r.P99);
                json.WriteNumber("share_above_prediction", r.ShareAbove);
                json.WriteEndObject();
            }

            json.WriteEndObject();
        });
}
