using System.Globalization;
using System.Numerics;
using System.Runtime.InteropServices;
using FlexLLM.Adapters;
using FlexLLM.Benchmarks.Serving;
using FlexLLM.Graph;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `serve`: requests of a trace and a finetuning job on this machine in real time, through the public engine, in every sharing mode
/// and under every load; the same arrivals and seeds for all of them. Shared cores make times noisy: modes take turns in the order.
/// </summary>
internal static class ServeVerb
{
    public const string Usage = ServeSettings.Usage;

    // Long enough for the batch to fill and for requests of all lengths to come and go.
    private const double CapacitySecondsMin = 15;

    public static int Run(string[] args)
    {
        ServeSettings asked = ServeSettings.Parse(args);
        Func<int, ComputeDevice> open = threads => BenchDevice.Create(asked.Device, threads);
        _ = open(asked.Threads);
        using RandomWeights? random = asked.Model.Weights(asked.Weights);
        ServeSettings settings = asked with { Open = open, Random = random };
        ServingReport report = RunAsync(settings).GetAwaiter().GetResult();
        report.Write(Console.Out);
        report.Save(settings.JsonFile, settings.HtmlFile);
        return 0;
    }

    private static async Task<ServingReport> RunAsync(ServeSettings settings)
    {
        ArrivalTrace trace = settings.ReadTrace();
        string loadAverage = FirstLine("/proc/loadavg");
        Roofline best = RooflineMeasurement.Of(settings.Device, settings.Open(settings.Threads), settings.Threads);
        (LiveCapacity capacity, ServingCosts costs) = await CapacityAsync(settings, trace, best).ConfigureAwait(false);
        ServiceLevelObjective slo = capacity.Targets(settings);
        IReadOnlyList<(string Name, double Rate)> loads = settings.LoadsOf(capacity);
        (string Name, string Value)[] measured = Describe(capacity, costs, slo, loads);
        foreach ((string name, string value) in measured)
        {
            Console.WriteLine($"{name}: {value}");
        }

        return new ServingReport
        {
            Title = "Serving and finetuning on one machine",
            Settings = [.. settings.Describe(), .. measured],
            Machine = Machine(loadAverage),
            Costs = costs,
            Sections =
            [
                new ServingSection
                {
                    Runs = await RunsAsync(settings, trace, slo, loads).ConfigureAwait(false),
                    Notes = Notes(settings),
                },
            ],
        };
    }

    private static async Task<(LiveCapacity Capacity, ServingCosts Costs)> CapacityAsync(
        ServeSettings settings, ArrivalTrace trace, Roofline best)
    {
        double seconds = Math.Max(CapacitySecondsMin, settings.Seconds / 2);
        Console.Error.WriteLine($"capacity: {seconds.Fixed(0)} s of an engine without finetuning");
        LiveServer server = await LiveServer.StartAsync(settings, ServingMode.Parse("inference-only"), new()).ConfigureAwait(false);
        await using (server.ConfigureAwait(false))
        {
            ArrivalTrace lengths = LiveCapacity.LengthsOf(trace, settings);
            LiveCapacity capacity = await LiveCapacity.MeasureAsync(server.Serving!, lengths, settings, seconds).ConfigureAwait(false);
            return (capacity, await server.Serving!.CallAsync(loop => CostsOf(loop.Model, settings, best), default).ConfigureAwait(false));
        }
    }

    private static ServingCosts CostsOf(LoadedModel model, ServeSettings settings, Roofline best)
    {
        ModelWork work = ModelWork.Of(model);
        TrainingProgram program = model.CompileTraining(PeftAdapter.NetworksOf(settings.Lora, model.Whole));
        return new ServingCosts(
            best, model.Matrix(model.Program.Logits.Weight).Type, work.WeightBytes, work.LinearFlopsPerRow,
            work.LinearFlopsPerRow + work.HeadFlopsPerRow,
            work.TrainFlops(settings.SampleTokens, model, program) / settings.SampleTokens);
    }

    // Runs of one mode are apart in time, and no mode always comes first: what else the machine does falls on all alike.
    private static async Task<IReadOnlyList<ServingRun>> RunsAsync(
        ServeSettings settings, ArrivalTrace trace, ServiceLevelObjective slo, IReadOnlyList<(string Name, double Rate)> loads)
    {
        List<(int Round, ServingMode Mode, string Load, double Rate)> plan =
        [
            .. Enumerable.Range(0, settings.Rounds).SelectMany(round => settings.Modes.Where(mode => !mode.Serves)
                .Select(mode => (round, mode, "none", 0.0))
                .Concat(loads.SelectMany((load, i) => Rotated(settings.Modes.Where(mode => mode.Serves), round + i)
                    .Select(mode => (round, mode, load.Name, load.Rate))))),
        ];
        var runs = new List<ServingRun>();
        foreach ((int round, ServingMode mode, string load, double rate) in plan)
        {
            string prefix = $"[{runs.Count + 1}/{plan.Count}] {load} {mode.Name}";
            Console.Error.WriteLine(prefix);
            ServeSettings now = settings with { Seed = settings.Seed + (ulong)round };
            ArrivalTrace? arrivals = mode.Serves ? now.Window(trace, rate) : null;
            LiveServer server = await LiveServer.StartAsync(now, mode, slo).ConfigureAwait(false);
            await using (server.ConfigureAwait(false))
            {
                runs.Add(await LiveRun.MeasureAsync(
                    server, now, arrivals, slo, (mode.Name, load), line => Console.Error.WriteLine($"{prefix}: {line}"))
                    .ConfigureAwait(false));
            }
        }

        return ServingRun.JoinedInOrder(runs, settings.Modes, loads);
    }

    private static IEnumerable<ServingMode> Rotated(IEnumerable<ServingMode> modes, int by)
    {
        ServingMode[] all = [.. modes];
        return all.Select((_, i) => all[(i + by) % all.Length]);
    }

    private static (string Name, string Value)[] Describe(
        LiveCapacity capacity, ServingCosts costs, ServiceLevelObjective slo, IReadOnlyList<(string Name, double Rate)> loads) =>
    [
        (
            "alone",
            $"TPOT {(1e3 * capacity.Tpot).Fixed(1)} ms, TTFT {(1e3 * capacity.Ttft).Fixed(1)} ms; the weights alone are read in " +
            $"{(1e3 * costs.DecodeSecondsMin).Fixed(1)} ms, {(100 * costs.DecodeSecondsMin / capacity.Tpot).Fixed(0)} % of that TPOT"),
        .. capacity.Describe(slo, loads),
    ];

    private static (string Name, string Value)[] Machine(string loadAverage) =>
    [
        ("processors", Environment.ProcessorCount.ToString(CultureInfo.InvariantCulture)),
        ("vector", $"{Vector<byte>.Count * 8} bits"),
        ("os", RuntimeInformation.OSDescription),
        ("runtime", RuntimeInformation.FrameworkDescription),
        ("load average at the start", loadAverage),
    ];

    private static List<string> Notes(ServeSettings settings)
    {
        var notes = new List<string>
        {
            "Times count from the arrival in the trace, waiting included. Tokens count within the window; a prompt counts when its first " +
            "token is there, a finetuning token once, in its forward pass. An answer that did not end in time counts as a miss.",
        };
        AddFor(ServingLayout.Training, "finetune-only: nothing arrives, so it has no load; whole samples at a time.");
        AddFor(
            ServingLayout.Split,
            $"split: two engines in one process, {settings.ServingThreads} thread(s) for all requests and {settings.TrainingThreads} for " +
            "finetuning; both have their own copy of the weights.");
        AddFor(
            ServingLayout.Spatial,
            $"spatial: two engines in one process with {settings.Threads} threads each; the operating system shares the processors.");
        return notes;

        void AddFor(ServingLayout layout, string note)
        {
            if (settings.Modes.Any(mode => mode.Layout == layout))
            {
                notes.Add(note);
            }
        }
    }

    // Absent where the operating system is another one.
    private static string FirstLine(string file) => File.Exists(file) ? File.ReadLines(file).First() : "unknown";
}
