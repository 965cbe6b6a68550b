using FlexLLM.Benchmarks.Serving;
using FlexLLM.Engine;
using FlexLLM.Finetuning;
using FlexLLM.Scheduling;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>
/// What `serve` does, on a machine that exists only as a profile: the same requests, samples, targets and limits of the engine, with
/// no other noise than the profile's own. It tells the modes apart where real runs of minutes do not, and it has the oracle.
/// </summary>
internal sealed class MachineScenario
{
    /// <summary>Options beside those of <see cref="ServeSettings.ParseSimulated"/>.</summary>
    public const string Usage = "--profile FILE [--jitter X] [--log FOLDER]";

    // Requests without end for as long as it takes the batch to fill, and twice that to count in.
    private const double CapacitySeconds = 120;

    // The quantile of a normal distribution that a profile's tail is: 99.5 %.
    private const double TailDeviations = 2.576;

    private readonly ServeSettings _settings;
    private readonly LatencyModel _profile;
    private readonly SimulatedLoad _serving;
    private readonly ArrivalTrace _trace;
    private readonly string? _logFolder;

    private MachineScenario(ServeSettings settings, LatencyModel profile, ArrivalTrace trace, double? jitter, string? logFolder)
    {
        (_settings, _profile, _trace, _logFolder) = (settings, profile, trace, logFolder);
        ModelConfig config = settings.Model.Config();
        if (settings.ContextTokens > config.MaxPositions)
        {
            throw new ArgumentException(
                $"Sequences of {settings.ContextTokens} tokens are asked for; the model takes at most {config.MaxPositions}.");
        }

        Jitter = jitter ?? (Math.Log(profile.Tail) / TailDeviations);
        _serving = new SimulatedLoad
        {
            Times = new ProfileTimes(profile),
            Layers = config.LayerCount,
            KvTokens = settings.KvTokens,
            ContextTokens = settings.ContextTokens,
            TpotTarget = 0.05,
            Seconds = settings.Seconds,
            TokensPerStepMax = settings.ServerStepTokens,
            SequencesMax = settings.Sequences,
            Samples = SamplesOf(settings, config),
            Accumulation = settings.Accumulation,
            Jitter = Jitter,
        };
        LiveCapacity capacity = Capacity();
        ServiceLevelObjective slo = capacity.Targets(settings);
        _serving = _serving with
        {
            TpotTarget = slo.TimePerOutputToken.TotalSeconds,
            TtftTarget = slo.TimeToFirstToken.TotalSeconds,
        };
        Loads = settings.LoadsOf(capacity);
        Measured =
        [
            ("alone", $"TPOT {(1e3 * capacity.Tpot).Fixed(1)} ms, TTFT {(1e3 * capacity.Ttft).Fixed(1)} ms"),
            .. capacity.Describe(slo, Loads),
        ];
    }

    /// <summary>Deviation of the logarithm of a step's time: such that the profile's tail is exceeded as often as it says.</summary>
    public double Jitter { get; }

    /// <summary>Names of the loads, with arrivals a second.</summary>
    public IReadOnlyList<(string Name, double Rate)> Loads { get; }

    /// <summary>What the engine can do alone, and what follows from it.</summary>
    public IReadOnlyList<(string Name, string Value)> Measured { get; }

    /// <summary>Runs what the arguments ask for, prints it, and saves it.</summary>
    /// <exception cref="ArgumentException">An unknown option, or a value out of its range.</exception>
    /// <exception cref="InvalidFileException">A broken profile, trace, dataset or model.</exception>
    public static int Run(string[] args, TextWriter output, TextWriter progress)
    {
        ServeSettings settings = ServeSettings.ParseSimulated(args, "--scenario", "--profile", "--jitter", "--log");
        string file = CommandLine.Require(args, "--profile");
        ArrivalTrace trace = settings.ReadTrace();
        string? log = CommandLine.Text(args, "--log") is string folder ? Directory.CreateDirectory(folder).FullName : null;
        var scenario = new MachineScenario(
            settings, LatencyProfileFile.Read(file), trace, CommandLine.Number(args, "--jitter"), log);
        foreach ((string name, string value) in scenario.Measured)
        {
            output.WriteLine($"{name}: {value}");
        }

        IReadOnlyList<ServingRun> runs = scenario.RunAll(progress);
        var report = new ServingReport
        {
            Title = "Serving and finetuning on one machine, simulated",
            Settings = [.. settings.DescribeLoad(), .. scenario.Measured],
            Machine = [("machine", $"the profile {Path.GetFileName(file)}, steps off by {(100 * scenario.Jitter).Fixed(1)} % (deviation)")],
            Sections = [new ServingSection { Runs = runs, Notes = [.. Notes(runs)] }],
        };
        report.Write(output);
        report.Save(settings.JsonFile, settings.HtmlFile);
        return 0;
    }

    /// <summary>Simulates every mode under every load, each once a round with other arrivals.</summary>
    public IReadOnlyList<ServingRun> RunAll(TextWriter progress)
    {
        (ServingMode Mode, string Load, double Rate, ulong Seed)[] tasks =
        [
            .. _settings.Modes.SelectMany(mode => (mode.Serves ? Loads : [("none", 0.0)]).SelectMany(load =>
                Enumerable.Range(0, _settings.Rounds).Select(i => (mode, load.Name, load.Rate, _settings.Seed + (ulong)i)))),
        ];
        ServingRun[] runs = SimulatedRuns.All(
            tasks, t => Run(t.Mode, t.Load, t.Rate, t.Seed), t => $"{t.Load} {t.Mode.Name}", progress);
        return ServingRun.JoinedInOrder(runs, _settings.Modes, Loads);
    }

    /// <summary>Simulates one mode under one load.</summary>
    public ServingRun Run(ServingMode mode, string load, double rate, ulong seed)
    {
        SimulatedLoad serving = _serving with
        {
            Arrivals = mode.Serves ? (_settings with { Seed = seed }).Window(_trace, rate).Arrivals : [],
            Policy = mode.Policy,
        };
        int engines = 0;
        return mode.Layout switch
        {
            ServingLayout.Shared when mode == ServingMode.Oracle => Simulate(serving with { KnowsTimes = true, Jitter = 0 }),
            ServingLayout.Shared => Simulate(serving),
            ServingLayout.Serving => Simulate(serving with { Samples = [] }),
            ServingLayout.Training => Simulate(Trainer(1)),
            ServingLayout.Split => Both(
                (double)_settings.ServingThreads / _settings.Threads, (double)_settings.TrainingThreads / _settings.Threads),
            _ => Both(0.5, 0.5),
        };

        // A profile tells nothing of fewer threads: so many times slower is what it comes to at worst.
        ServingRun Both(double servingShare, double trainingShare) =>
            Simulate(serving with { Samples = [], Times = ProfileTimes.OnShare(_profile, servingShare) })
                .Beside(Simulate(Trainer(trainingShare)));

        SimulatedLoad Trainer(double share) => _serving with
        {
            Times = ProfileTimes.OnShare(_profile, share),
            TokensPerStepMax = _settings.TrainerStepTokens,
            SequencesMax = 1,
            KvTokens = _settings.SampleTokens,
            IdleStepMax = LiveServer.TrainerStepMax,
        };

        ServingRun Simulate(SimulatedLoad what)
        {
            string? log = EventLog.PathIn(_logFolder, $"{mode.Name}-{load}-{seed}-{++engines}");
            using var simulation = new ServingSimulation(what with { LogFile = log }, seed);
            return simulation.Run(mode.Name, load);
        }
    }

    private LiveCapacity Capacity()
    {
        ArrivalTrace lengths = LiveCapacity.LengthsOf(_trace, _settings);
        SimulatedLoad alone = _serving with
        {
            Policy = SharingPolicy.InferenceOnly,
            Samples = [],
            Seconds = CapacitySeconds,
            TtftTarget = 1e4, // Nobody is turned away for waiting.
        };
        RequestOutcome first = Simulate([LiveCapacity.Typical(lengths, _settings)], alone).Requests[0];

        // As many callers as may run, each with a new request when it has its answer.
        ServingRun full = Simulate(
            [.. lengths.Arrivals.Select(a => a with { Time = 0 })], alone with { PlacesMax = _settings.Sequences });
        ThroughputPoint[] counted = [.. full.Series.Skip(full.Series.Count / 3)];
        double generated = counted.Sum(p => p.GeneratedTokens) / (CapacitySeconds * counted.Length / full.Series.Count);
        return new LiveCapacity(first.Tpot!.Value, first.Ttft!.Value, generated, generated / lengths.MeanAnswerTokens);

        ServingRun Simulate(TraceArrival[] arrivals, SimulatedLoad load)
        {
            using var simulation = new ServingSimulation(load with { Arrivals = arrivals }, _settings.Seed);
            return simulation.Run("inference-only", "capacity");
        }
    }

    // Lengths as the job of `serve` has them.
    private static int[] SamplesOf(ServeSettings settings, ModelConfig config)
    {
        CheckpointFiles files = settings.Model.IsShape ? CheckpointFiles.None(config) : CheckpointFiles.Load(settings.Model.Source, config);
        TrainingDataset data = FinetuningData.Load(settings.Data, files.Tokenizer, config, settings.SampleTokens, settings.Seed);
        var builder = new SampleBuilder(config, files.Tokenizer, files.ChatTemplate, settings.SampleTokens, refuseBad: false);
        return [.. builder.Build(data, CancellationToken.None).Samples.Select(s => s.Ids.Length)];
    }

    private static IEnumerable<string> Notes(IReadOnlyList<ServingRun> runs)
    {
        yield return "No time passed but that of the profile. Times count from the arrival in the trace, waiting included; tokens count " +
            "within the window, a finetuning token once, in its forward pass.";
        foreach (IGrouping<string, ServingRun> load in runs.Where(r => r.Mode != ServingMode.Oracle.Name).GroupBy(r => r.Load))
        {
            if (runs.FirstOrDefault(r => r.Load == load.Key && r.Mode == ServingMode.Oracle.Name) is ServingRun oracle)
            {
                yield return $"{load.Key}, finetuning as a share of the oracle's: " + string.Join(", ", load
                    .Where(r => r.TokensTrained > 0)
                    .Select(r => $"{r.Mode} {(100 * r.TrainedPerSecond / oracle.TrainedPerSecond).Fixed(1)} %"));
            }
        }
    }
}
