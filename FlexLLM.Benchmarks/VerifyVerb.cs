using System.Globalization;
using System.Text.Json;
using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Formats;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `verify DIR`: recomputes golden data made by HuggingFace transformers and PEFT (its format is described in the folder's
/// manifest.json) and prints one line a check; the last line is `N passed, N failed`.
/// </summary>
internal sealed class VerifyVerb(TextWriter output)
{
    private int _passed;
    private int _failed;

    /// <summary>Exit code 1 when a check failed.</summary>
    public static int Run(string[] args)
    {
        if (args.Length < 1 || !Directory.Exists(args[0]))
        {
            Console.Error.WriteLine("Usage: verify DIR [--threads N]   (a folder with manifest.json)");
            return 2;
        }

        return new VerifyVerb(Console.Out).Verify(args[0], CommandLine.Int(args, "--threads", 2));
    }

    /// <summary>Runs every check of every model in the folder on the CPU backend.</summary>
    public int Verify(string folder, int threads) => Verify(folder, () => new CpuBackend(threads));

    /// <summary>Runs every check of every model in the folder, each model on a backend of its own.</summary>
    public int Verify(string folder, Func<IComputeBackend> open)
    {
        string manifestPath = Path.Combine(folder, "manifest.json");
        using JsonDocument manifest = JsonDocument.Parse(File.ReadAllBytes(manifestPath));
        foreach (JsonProperty entry in manifest.RootElement.GetProperty("models").EnumerateObject())
        {
            VerifyModel(Path.Combine(folder, entry.Name), new GoldenModel(folder, entry), open);
        }

        output.WriteLine($"{_passed} passed, {_failed} failed");
        return _failed == 0 ? 0 : 1;
    }

    /// <summary>Prints one line and counts it.</summary>
    public void Report(string model, string check, bool passed, string detail)
    {
        _ = passed ? _passed++ : _failed++;
        output.WriteLine($"{(passed ? "ok  " : "FAIL")} {model,-16} {check,-42} {detail}");
    }

    /// <summary>A check of an error against its bound.</summary>
    public void ReportError(string model, string check, double error, double bound) =>
        Report(model, check, error <= bound, string.Create(CultureInfo.InvariantCulture, $"{error:0.00e+00} <= {bound:0.00e+00}"));

    private void VerifyModel(string folder, GoldenModel golden, Func<IComputeBackend> open)
    {
        using IComputeBackend backend = open();
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(folder);
        ModelConfig config = ModelConfig.Load(folder);
        using LoadedModel model = LoadedModel.Load(checkpoint, config, backend, null, config.MaxPositions);
        using (var inference = new VerifyInference(this, golden, model))
        {
            inference.Run();
        }

        foreach ((string variant, string adapterFolder) in golden.Adapters)
        {
            using var training = new VerifyTraining(this, golden, model, variant, adapterFolder);
            training.Run();
        }
    }
}

/// <summary>One model's entry in the manifest, with its golden tensors.</summary>
internal sealed class GoldenModel
{
    private readonly JsonElement _entry;

    public GoldenModel(string folder, JsonProperty entry)
    {
        Name = entry.Name;
        _entry = entry.Value;
        using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(folder, _entry.GetProperty("golden").GetString()!));
        foreach (SafetensorsTensor tensor in file.Tensors.Values)
        {
            if (tensor.Type is StoredType.I64)
            {
                Ints[tensor.Name] = [.. tensor.ToInt64s().Select(i => (int)i)];
            }
            else
            {
                Doubles[tensor.Name] = tensor.ToDoubles();
            }
        }

        Adapters = [.. _entry.GetProperty("adapters").EnumerateObject().Select(a => (a.Name, Path.Combine(folder, a.Value.GetString()!)))];
    }

    public string Name { get; }

    /// <summary>Floating-point tensors by name.</summary>
    public Dictionary<string, double[]> Doubles { get; } = [];

    /// <summary>Token ids by name.</summary>
    public Dictionary<string, int[]> Ints { get; } = [];

    /// <summary>Folders of the initial adapters by variant.</summary>
    public IReadOnlyList<(string Variant, string Folder)> Adapters { get; }

    /// <summary>The reference: the float64 evaluation where the file has it, otherwise float32.</summary>
    public double[]? Reference(string name) => Doubles.GetValueOrDefault($"f64.{name}") ?? Doubles.GetValueOrDefault(name);

    /// <summary>A figure of how far plain float32 evaluation is from float64 in a group.</summary>
    public double? F32Error(string group, string figure) =>
        _entry.GetProperty("max_f32_vs_f64").TryGetProperty(group, out JsonElement e) ? e.GetProperty(figure).GetDouble() : null;

    /// <summary>A list of float64 scalars, such as a loss curve.</summary>
    public double[] Scalars(string name) =>
        [.. _entry.GetProperty("scalars_f64").GetProperty(name).EnumerateArray().Select(e => e.GetDouble())];

    /// <summary>The same list as float32 evaluation gives it.</summary>
    public double[] ScalarsF32(string name) =>
        [.. _entry.GetProperty("scalars_f32").GetProperty(name).EnumerateArray().Select(e => e.GetDouble())];

    public double Scalar(string name) => _entry.GetProperty("scalars_f64").GetProperty(name).GetDouble();
}

/// <summary>Distances between what we compute and what the reference holds.</summary>
internal static class Distance
{
    public static double Max(ReadOnlySpan<float> ours, ReadOnlySpan<double> reference)
    {
        double worst = ours.Length == reference.Length ? 0 : double.PositiveInfinity;
        for (int i = 0; i < Math.Min(ours.Length, reference.Length); i++)
        {
            double difference = Math.Abs(ours[i] - reference[i]);
            worst = difference <= worst ? worst : difference; // NaN must not pass.
        }

        return worst;
    }

    /// <summary>Norm of the difference over norm of the reference.</summary>
    public static double Relative(ReadOnlySpan<float> ours, ReadOnlySpan<double> reference)
    {
        double difference = 0;
        double norm = 0;
        for (int i = 0; i < reference.Length; i++)
        {
            difference += (ours[i] - reference[i]) * (ours[i] - reference[i]);
            norm += reference[i] * reference[i];
        }

        return Math.Sqrt(difference / Math.Max(norm, double.Epsilon));
    }

    /// <summary>The largest relative difference of a curve.</summary>
    public static double Curve(double[] ours, double[] reference)
    {
        double worst = ours.Length == reference.Length ? 0 : double.PositiveInfinity;
        for (int i = 0; i < Math.Min(ours.Length, reference.Length); i++)
        {
            double error = Math.Abs(ours[i] - reference[i]) / Math.Abs(reference[i]);
            worst = error <= worst ? worst : error;
        }

        return worst;
    }
}
