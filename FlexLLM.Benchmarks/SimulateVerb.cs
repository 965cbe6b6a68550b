using FlexLLM.Benchmarks.Serving;
using FlexLLM.Benchmarks.Simulation;
using FlexLLM.Engine;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `simulate`: the paper's evaluation on machines that exist only as a clock: all sharing modes at all rates, beside the authors'
/// figures. With `--scenario machine`, what `serve` does, on a measured profile (<see cref="MachineScenario"/>). With --log, every event of
/// every engine as text (<see cref="EventLog"/>). With --calibrate, what those machines' rates are and how near they bring the authors' own
/// policy to its figures.
/// </summary>
internal static class SimulateVerb
{
    public static string Usage { get; } =
        "[--scenario paper | --model 8b|14b|32b] [--modes NAME,NAME] [--rates 4,8,12,16,20] [--minutes 10] [--seed 1] [--seeds 1] " +
        "[--burst 0.1] [--tokens 2048] [--trace CSV [--lengths drawn|trace]] [--profile FILE] [--log FOLDER] [--json FILE] " +
        "[--html FILE], " +
        "or --scenario machine " + MachineScenario.Usage + " " + ServeSettings.LoadUsage + ", " +
        "or --calibrate [--model NAME] [--minutes 10] [--seed 1]";

    public static int Run(string[] args) => Run(args, Console.Out, Console.Error);

    public static int Run(string[] args, TextWriter output, TextWriter progress)
    {
        if (CommandLine.Text(args, "--scenario") == "machine")
        {
            return MachineScenario.Run(args, output, progress);
        }

        bool calibrates = CommandLine.TakeFlag(ref args, "--calibrate");
        CommandLine.Allow(
            args, "--scenario", "--model", "--modes", "--rates", "--minutes", "--seed", "--seeds", "--burst", "--tokens", "--trace",
            "--lengths", "--profile", "--log", "--json", "--html");
        IReadOnlyList<SimulatedModel> models = ModelsOf(args);
        double seconds = 60.0 * CommandLine.Int(args, "--minutes", 10, min: 1);
        ulong seed = (ulong)CommandLine.Int(args, "--seed", 1, min: 0);
        if (calibrates)
        {
            CalibrationReport.Print(output, models, seconds, seed);
            return 0;
        }

        string[] modes = CommandLine.Text(args, "--modes")?.Split(',') ?? [.. ModeRunner.Modes];
        if (modes.FirstOrDefault(m => !ModeRunner.Knows(m)) is string unknown)
        {
            throw new ArgumentException($"--modes: '{unknown}' is no mode; known are {string.Join(", ", ModeRunner.Modes)}.");
        }

        int[] rates = CommandLine.Ints(args, "--rates", [4, 8, 12, 16, 20], min: 1);
        string? trace = CommandLine.Text(args, "--trace");
        bool keepsLengths = CommandLine.Text(args, "--lengths") switch
        {
            null or "drawn" => false,
            "trace" when trace is not null => true,
            "trace" => throw new ArgumentException("--lengths trace needs --trace."),
            string other => throw new ArgumentException($"--lengths: '{other}' is neither drawn nor trace."),
        };
        string? profile = CommandLine.Text(args, "--profile");
        string? log = CommandLine.Text(args, "--log") is string folder ? Directory.CreateDirectory(folder).FullName : null;
        ArrivalTrace? arrivals = trace is null ? null : ArrivalTrace.Read(trace);
        int seeds = CommandLine.Int(args, "--seeds", 1, min: 1);
        double burst = CommandLine.Number(args, "--burst") ?? SimulatedWorkload.DefaultBurst;
        int tokens = CommandLine.Int(args, "--tokens", 2048, min: 16);
        var results = new List<(SimulatedModel, IReadOnlyList<ServingRun>)>();
        foreach (SimulatedModel model in models)
        {
            var setting = new SimulationSetting
            {
                Model = model,
                Seconds = seconds,
                Seed = seed,
                Burst = burst,
                Trace = arrivals,
                KeepsTraceLengths = keepsLengths,
                Profile = profile is null ? null : LatencyProfileFile.Read(profile),
                TokensPerStepMax = tokens,
                LogFolder = log,
            };
            IReadOnlyList<ServingRun> runs = RunAll(setting, seeds, modes, rates, progress);
            SimulationReport.Print(output, model, runs);
            results.Add((model, runs));
        }

        ServingReport report = SimulationReport.Of(results,
        [
            ("seconds", $"{seconds:F0}"), ("seeds", $"{seed} to {seed + (ulong)seeds - 1}"),
            ("arrivals", trace is null ? FormattableString.Invariant($"drawn, burst {burst}") : Path.GetFileName(trace)),
            ("lengths", keepsLengths ? "of the trace" : "drawn with the means of ShareGPT's first turns"),
            ("step times", profile is null ? "calibrated machine" : Path.GetFileName(profile)),
            ("rows in a step of co-serving", $"{tokens}"),
        ]);
        report.Save(CommandLine.Text(args, "--json"), CommandLine.Text(args, "--html"));
        return 0;
    }

    private static IReadOnlyList<SimulatedModel> ModelsOf(string[] args)
    {
        string? scenario = CommandLine.Text(args, "--scenario");
        if (scenario is not (null or "paper"))
        {
            throw new ArgumentException($"--scenario: '{scenario}' is unknown; known are paper and machine.");
        }

        return CommandLine.Text(args, "--model") is string name ? [SimulatedModel.Of(name)] : SimulatedModel.Paper;
    }

    private static ServingRun[] RunAll(SimulationSetting setting, int seeds, string[] modes, int[] rates, TextWriter progress)
    {
        (string Mode, int Rate, ulong Seed)[] tasks =
        [
            .. modes.SelectMany(mode => rates.SelectMany(rate =>
                Enumerable.Range(0, seeds).Select(i => (mode, rate, setting.Seed + (ulong)i)))),
        ];
        ServingRun[] runs = SimulatedRuns.All(
            tasks, t => ModeRunner.Run(setting with { Seed = t.Seed }, t.Mode, t.Rate),
            t => $"{setting.Model.Name} {t.Mode} {t.Rate} req/s", progress);
        return [.. runs.Chunk(seeds).Select(ServingRun.Joined)];
    }
}
