using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.Json;
using FlexLLM.Backends;
using FlexLLM.Formats;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `roofline`: what a device does at best, copying and multiplying, F32 and BF16. On libtorch a second table says what of that is left
/// when the engine's waist asks for the product, which takes and gives rows of the activations' type whatever the weights are, and a
/// third what the calls of a decode step cost.
/// </summary>
internal static class RooflineVerb
{
    public const string Usage = DeviceChoice.Usage + " [--threads 2] [--copy-mib N] [--rows N] [--side N] [--repeat 5] [--json FILE]";

    public static int Run(string[] args)
    {
        CommandLine.Allow(args, [.. DeviceChoice.Options, "--threads", "--copy-mib", "--rows", "--side", "--repeat", "--json"]);
        DeviceChoice device = DeviceChoice.Parse(args);
        if (device.Ranks.Length > 1)
        {
            throw new ArgumentException($"--device {device.Name}: this verb measures one device.");
        }

        int threads = CommandLine.Int(args, "--threads", 2, min: 1);
        int repeat = CommandLine.Int(args, "--repeat", RooflineMeasurement.RepeatDefault, min: 1);
        string? file = CommandLine.Text(args, "--json");
        ProbeSize size = SizeOf(args, ProbeSize.Of(device));
        using IComputeBackend backend = BenchDevice.Create(device, threads).CreateBackend();
        var rows = new List<(string Name, Spread Rate, string Unit)>();
        using (DeviceProbe probe = RooflineMeasurement.Probe(device, backend, size, threads))
        {
            Console.Error.WriteLine($"{backend.Name}: copies and products");
            rows.AddRange(Named(RooflineMeasurement.Run(probe, size, repeat), ""));
        }

        Roofline best = new(rows[0].Rate.Max, rows[1].Rate.Max, rows[2].Rate.Max);
        RooflineCalls[] calls = [];
        if (device.IsTorch)
        {
            Console.Error.WriteLine($"{backend.Name}: the same through the waist");
            using (var waist = new BackendProbe(backend, size, threads: null))
            {
                rows.AddRange(Named(RooflineMeasurement.Run(waist, size, repeat), "waist: "));
            }

            Console.Error.WriteLine($"{backend.Name}: calls");
            calls = RooflineMeasurement.Calls(backend, repeat);
        }

        // What memory of the host does says nothing about a device that an 8B model is served on.
        double? copy = device.IsCuda ? best.CopyBytesPerSecond : null;

        Print(Console.Out, $"{backend.Name}; {size.CopyBytes >> 20} MiB, [{size.Rows}, {size.Side}] x [{size.Side}, {size.Side}]", rows);
        if (calls.Length > 0)
        {
            Console.WriteLine();
            RooflineCalls.Print(Console.Out, calls, copy);
        }

        if (file is not null)
        {
            Save(file, (backend.Name, size, repeat), best, rows, json => RooflineCalls.Write(json, calls, copy));
        }

        return 0;
    }

    private static ProbeSize SizeOf(string[] args, ProbeSize otherwise)
    {
        int side = CommandLine.Int(args, "--side", otherwise.Side, min: 16);
        long bytes = (long)CommandLine.Int(args, "--copy-mib", (int)(otherwise.CopyBytes >> 20), min: 1) << 20;
        return side % 16 == 0 && bytes / sizeof(float) >= side
            ? new ProbeSize(bytes, CommandLine.Int(args, "--rows", otherwise.Rows, min: 1), side)
            : throw new ArgumentException("--side must be a multiple of 16, and a row of it no larger than what is copied.");
    }

    private static IEnumerable<(string Name, Spread Rate, string Unit)> Named(
        (Spread Copy, Spread F32, Spread BF16) rates, string prefix) =>
    [
        ($"{prefix}copy", rates.Copy, "GB/s"),
        ($"{prefix}matrix F32", rates.F32, "GFLOP/s"),
        ($"{prefix}matrix BF16", rates.BF16, "GFLOP/s"),
    ];

    private static void Print(TextWriter output, string title, List<(string Name, Spread Rate, string Unit)> rows)
    {
        output.WriteLine(title);
        output.WriteLine($"{"",-22}{"best",12}{"median",12}{"min",12}");
        foreach ((string name, Spread rate, string unit) in rows)
        {
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{name,-22}{rate.Max / 1e9,12:0.0}{rate.Median / 1e9,12:0.0}{rate.Min / 1e9,12:0.0} {unit}"));
        }
    }

    private static void Save(
        string file, (string Backend, ProbeSize Size, int Repeat) what, Roofline best,
        List<(string Name, Spread Rate, string Unit)> rows, Action<Utf8JsonWriter> writeCalls) =>
        AtomicFile.WriteJson(file, json =>
        {
            json.WriteStartObject();
            json.WriteString("backend", what.Backend);
            json.WriteNumber("processors", Environment.ProcessorCount);
            json.WriteString("os", RuntimeInformation.OSDescription);
            json.WriteString("runtime", RuntimeInformation.FrameworkDescription);
            json.WriteNumber("copy_bytes", what.Size.CopyBytes);
            json.WriteNumber("rows", what.Size.Rows);
            json.WriteNumber("side", what.Size.Side);
            json.WriteNumber("repetitions", what.Repeat);
            best.Write(json);
            json.WriteStartArray("results");
            foreach ((string name, Spread rate, string unit) in rows)
            {
                json.WriteStartObject();
                json.WriteString("name", name);
                rate.Write(json, "per_second");
                json.WriteString("unit", unit == "GB/s" ? "bytes" : "operations");
                json.WriteEndObject();
            }

            json.WriteEndArray();
            writeCalls(json);
            json.WriteEndObject();
        });
}
