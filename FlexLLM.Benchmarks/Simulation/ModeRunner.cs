using FlexLLM.Benchmarks.Serving;
using FlexLLM.Scheduling;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>Everything but the mode and the rate of a simulated run.</summary>
internal sealed record SimulationSetting
{
    public required SimulatedModel Model { get; init; }

    public double Seconds { get; init; } = 600;

    public ulong Seed { get; init; } = 1;

    /// <summary>How bursty arrivals are (<see cref="SimulatedWorkload.Burst"/>).</summary>
    public double Burst { get; init; } = SimulatedWorkload.DefaultBurst;

    /// <summary>A profile measured on a real machine; null for the calibrated roofline.</summary>
    public LatencyModel? Profile { get; init; }

    /// <summary>Whose arrivals to scale; null draws them.</summary>
    public ArrivalTrace? Trace { get; init; }

    /// <summary>See <see cref="SimulatedWorkload.KeepsTraceLengths"/>.</summary>
    public bool KeepsTraceLengths { get; init; }

    /// <summary>Most rows of a batch of co-serving.</summary>
    public int TokensPerStepMax { get; init; } = 2048;

    /// <summary>Folder for the event logs, a file an engine; null to keep none.</summary>
    public string? LogFolder { get; init; }
}

/// <summary>
/// The modes of the paper's evaluation on four pipelines, of which one is simulated (paper.md g.1). Spatial sharing and machines
/// split between serving and finetuning are two engines with a clock each.
/// </summary>
internal static class ModeRunner
{
    /// <summary>What the authors' released scheduler does.</summary>
    public const string FixedBudget = "fixed-budget";

    public const string Oracle = "oracle";

    // A machine that only finetunes has nobody to be quick for.
    private static readonly TimeSpan AloneStepMax = TimeSpan.FromSeconds(10);

    /// <summary>All modes, ours first.</summary>
    public static IReadOnlyList<string> Modes { get; } =
    [
        "co-serving", Oracle, FixedBudget, "temporal-64", "temporal-128", "temporal-512", "temporal-dynamic", "spatial", "split-1/4",
        "split-2/4", "split-3/4", "inference-only", "finetune-only",
    ];

    /// <summary>Whether a mode has this name; temporal sharing takes any number of steps.</summary>
    public static bool Knows(string mode) => Modes.Contains(mode) || ServingMode.Temporal(mode) is not null;

    /// <summary>Simulates one mode.</summary>
    /// <param name="setting">Model, duration, seed.</param>
    /// <param name="mode">One of <see cref="Modes"/>.</param>
    /// <param name="rate">Arrivals a second on all four pipelines.</param>
    /// <exception cref="ArgumentException">There is no such mode.</exception>
    public static ServingRun Run(SimulationSetting setting, string mode, double rate)
    {
        string load = FormattableString.Invariant($"{rate} req/s");
        double perPipeline = rate / PaperFigures.Pipelines;
        SimulatedLoad shared = Shared(setting, perPipeline);
        int engines = 0;
        ServingRun run = mode switch
        {
            "co-serving" => Simulate(shared),
            Oracle => Simulate(shared with { KnowsTimes = true, Jitter = 0 }),
            FixedBudget => Simulate(shared with
            {
                Policy = SharingPolicy.FixedBudget(Calibration.BackwardLayers),
                TokensPerStepMax = Calibration.TokensPerBatch,
                Times = TimesOf(setting, wholeLayers: true),
            }),
            "spatial" => Both(
                Simulate(OnHalf(ServesAlone(shared), setting)), Simulate(OnHalf(TrainsAlone(shared), setting)), 1, 1),
            "split-1/4" or "split-2/4" or "split-3/4" => Split(setting, rate, mode[6] - '0'),
            "inference-only" => Simulate(ServesAlone(shared)),
            "finetune-only" => Simulate(TrainsAlone(shared)),
            _ when ServingMode.Temporal(mode) is SharingPolicy policy => Simulate(WholeSamples(shared, setting, policy)),
            _ => throw new ArgumentException($"'{mode}' is no mode; known are {string.Join(", ", Modes)}."),
        };
        bool isSplit = mode.StartsWith("split-", StringComparison.Ordinal);
        return isSplit ? run : Times(run, PaperFigures.Pipelines, PaperFigures.Pipelines);

        ServingRun Simulate(SimulatedLoad what)
        {
            using var simulation = new ServingSimulation(what with { LogFile = LogFile(++engines) }, setting.Seed);
            return simulation.Run(mode, load) with { RequestsPerSecond = rate };
        }

        string? LogFile(int engine) => EventLog.PathIn(
            setting.LogFolder, FormattableString.Invariant($"{setting.Model.Name}-{mode}-{rate}-{setting.Seed}-{engine}"));

        static ServingRun Both(ServingRun serving, ServingRun training, int serve, int train) =>
            Times(serving, serve, serve).Beside(Times(training, train, train));

        ServingRun Split(SimulationSetting s, double total, int servers)
        {
            SimulationSetting server = s with { Model = s.Model.AsServer() };
            return Both(
                Simulate(ServesAlone(Shared(server, total / servers))), Simulate(TrainsAlone(Shared(server, 1))), servers,
                PaperFigures.Pipelines - servers);
        }
    }

    private static SimulatedLoad Shared(SimulationSetting setting, double rate)
    {
        var workload = new SimulatedWorkload
        {
            RequestsPerSecond = rate,
            Seconds = setting.Seconds,
            Burst = setting.Burst,
            Trace = setting.Trace,
            KeepsTraceLengths = setting.KeepsTraceLengths,
        };
        return new SimulatedLoad
        {
            Times = TimesOf(setting),
            Layers = setting.Model.Config.LayerCount,
            KvTokens = setting.Model.KvTokens,
            TpotTarget = setting.Model.TpotTarget,
            Seconds = setting.Seconds,
            Arrivals = workload.Draw(setting.Seed),
            Samples = workload.DrawSamples(setting.Seed),
            TokensPerStepMax = setting.TokensPerStepMax,
        };
    }

    private static StepTimes TimesOf(SimulationSetting setting, bool wholeLayers = false) => setting.Profile is LatencyModel profile
        ? new ProfileTimes(profile)
        : new RooflineTimes(StepCosts.Of(setting.Model), wholeLayers);

    // The authors' temporal sharing takes a sample of up to 8,192 tokens forward at once (paper.md e.3). It has no latency model, so
    // that ours, which only bounds prompts here, must not be worse than exact.
    private static SimulatedLoad WholeSamples(SimulatedLoad load, SimulationSetting setting, SharingPolicy policy) => load with
    {
        Times = TimesOf(setting, wholeLayers: true),
        Policy = policy,
        TokensPerStepMax = SimulatedWorkload.TokensMax,
        KnowsTimes = true,
    };

    private static SimulatedLoad ServesAlone(SimulatedLoad load) => load with
    {
        Policy = SharingPolicy.InferenceOnly,
        Samples = [],
        TokensPerStepMax = Calibration.TokensPerBatch,
    };

    // Half of the rates; of a profile, which does not tell rates from overhead, half of the speed.
    private static SimulatedLoad OnHalf(SimulatedLoad load, SimulationSetting setting) => load with
    {
        Times = setting.Profile is LatencyModel profile
            ? ProfileTimes.OnShare(profile, 0.5)
            : TimesOf(setting with { Model = setting.Model.OnShare(0.5) }),
    };

    private static SimulatedLoad TrainsAlone(SimulatedLoad load) => load with
    {
        Policy = SharingPolicy.CoServing,
        Arrivals = [],
        TokensPerStepMax = SimulatedWorkload.TokensMax,
        IdleStepMax = AloneStepMax,
    };

    private static ServingRun Times(ServingRun run, int serving, int training) => run with
    {
        TokensGenerated = run.TokensGenerated * serving,
        TokensTrained = run.TokensTrained * training,
        Series =
        [
            .. run.Series.Select(p => p with
            {
                PromptTokens = p.PromptTokens * serving,
                GeneratedTokens = p.GeneratedTokens * serving,
                TrainedTokens = p.TrainedTokens * training,
            }),
        ],
    };
}
