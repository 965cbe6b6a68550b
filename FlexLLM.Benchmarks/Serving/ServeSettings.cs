using System.Globalization;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>What is asked of the serving verb.</summary>
internal sealed record ServeSettings
{
    public const string Usage =
        LoadUsage + " " + DeviceChoice.Usage + " [--device-bytes SIZE] [--weights f32|bf16] [--target-modules down_proj] [--rank 16] " +
        "[--drain-seconds N]   (modes: " + ServingMode.Defaults + ")";

    /// <summary>What a simulation of the same takes.</summary>
    public const string LoadUsage =
        ModelChoice.Usage + " [--trace CSV] [--modes NAME,NAME] " +
        "[--loads light,medium,heavy | --rates R,R] [--seconds 60] [--rounds 1] [--threads 2] [--tpot-ms X] [--ttft-ms X] " +
        "[--length-factor 1] [--max-prompt 128] [--max-answer 64] [--start-second S] [--sequences 16] [--step-tokens 256] " +
        "[--data JSONL] [--sample-tokens 256] [--accumulation 8] [--seed 1] [--json FILE] [--html FILE]";

    private static readonly (string Name, double Share)[] NamedLoads = [("light", 0.1), ("medium", 0.4), ("heavy", 0.7)];

    private static readonly string[] LoadOptions =
    [
        .. ModelChoice.Options, "--trace", "--modes", "--loads", "--rates", "--seconds", "--rounds", "--threads", "--tpot-ms", "--ttft-ms",
        "--length-factor", "--max-prompt", "--max-answer", "--start-second", "--sequences", "--step-tokens", "--data", "--sample-tokens",
        "--accumulation", "--seed", "--json", "--html",
    ];

    private static readonly string[] DeviceOptions =
        [.. DeviceChoice.Options, "--device-bytes", "--weights", "--target-modules", "--rank", "--drain-seconds"];

    public required ModelChoice Model { get; init; }

    /// <summary>Weights of a model without a folder; whoever runs the verb makes and frees them.</summary>
    public RandomWeights? Random { get; init; }

    public DeviceChoice Device { get; init; } = DeviceChoice.Cpu;

    /// <summary>Opens the device for so many threads. What opens one of libtorch's is not part of these sources.</summary>
    public Func<int, ComputeDevice> Open { get; init; } = threads => ComputeDevice.Cpu(threads);

    /// <summary>Most bytes of an engine on the device; null leaves it to the engine.</summary>
    public long? DeviceBytes { get; init; }

    /// <summary>CSV file, or null for arrivals drawn at random.</summary>
    public string? Trace { get; init; }

    public required IReadOnlyList<ServingMode> Modes { get; init; }

    /// <summary>Names of loads with their share of the measured capacity; empty where rates are given.</summary>
    public IReadOnlyList<(string Name, double Share)> Loads { get; init; } = NamedLoads;

    /// <summary>Arrivals a second; empty where loads are named.</summary>
    public IReadOnlyList<double> Rates { get; init; } = [];

    /// <summary>Length of the window in which requests arrive and tokens count.</summary>
    public double Seconds { get; init; } = 60;

    /// <summary>
    /// How often the window is run, each time with other arrivals and the modes in another order: they then share what else goes on.
    /// </summary>
    public int Rounds { get; init; } = 1;

    /// <summary>How long after the window an answer may end before its request counts as failed.</summary>
    public double DrainSeconds { get; init; } = 60;

    public int Threads { get; init; } = 2;

    /// <summary>Target in seconds, or null to derive it from the measured minimum.</summary>
    public double? TpotTarget { get; init; }

    /// <summary>Target in seconds, or null to derive it from the measured minimum.</summary>
    public double? TtftTarget { get; init; }

    public DType? Weights { get; init; }

    public TraceLengths Lengths { get; init; } = new(MaxPrompt: 128, MaxAnswer: 64);

    /// <summary>Where the slice of the trace begins, or null for a random place.</summary>
    public double? StartSecond { get; init; }

    public int Sequences { get; init; } = 16;

    public int StepTokens { get; init; } = 256;

    /// <summary>JSONL file to train on, or null for samples of random tokens.</summary>
    public string? Data { get; init; }

    public LoraConfig Lora { get; init; } = new() { Rank = 16, Alpha = 16, TargetModules = ["down_proj"] };

    /// <summary>Length of a sample in tokens; longer ones are cut.</summary>
    public int SampleTokens { get; init; } = 256;

    public int Accumulation { get; init; } = 8;

    public ulong Seed { get; init; } = 1;

    public string? JsonFile { get; init; }

    public string? HtmlFile { get; init; }

    /// <summary>Longest sequence that can occur, of requests and samples.</summary>
    public int ContextTokens => Math.Max(SampleTokens, Lengths.MaxPrompt + Lengths.MaxAnswer);

    /// <summary>Tokens in the KV cache of an engine that serves: as many sequences of the greatest length as may run.</summary>
    public int KvTokens => Sequences * ContextTokens;

    /// <summary>Most rows in a step of an engine that serves.</summary>
    public int ServerStepTokens => Math.Max(StepTokens, Sequences);

    /// <summary>Most rows in a step of an engine that only trains.</summary>
    public int TrainerStepTokens => Math.Max(StepTokens, SampleTokens);

    /// <summary>Threads of the half that serves in the split mode; at least one is left for the other half.</summary>
    public int ServingThreads => Math.Max(1, Threads / 2);

    /// <summary>Threads of the half that trains in the split mode.</summary>
    public int TrainingThreads => Math.Max(1, Threads - ServingThreads);

    /// <summary>Reads the verb's arguments.</summary>
    /// <exception cref="ArgumentException">An unknown option, or a value out of its range.</exception>
    public static ServeSettings Parse(string[] args) =>
        Parse(args, [.. LoadOptions, .. DeviceOptions], ServingMode.Defaults, ServingMode.Parse);

    /// <summary>Reads the arguments of a simulation of the verb, which may have others beside them.</summary>
    /// <exception cref="ArgumentException">An unknown option, or a value out of its range.</exception>
    public static ServeSettings ParseSimulated(string[] args, params ReadOnlySpan<string> others) =>
        Parse(args, [.. LoadOptions, .. others], ServingMode.SimulatedDefaults, ServingMode.ParseSimulated);

    private static ServeSettings Parse(string[] args, string[] options, string modes, Func<string, ServingMode> modeOf)
    {
        CommandLine.Allow(args, options);
        if (CommandLine.Has(args, "--loads") && CommandLine.Has(args, "--rates"))
        {
            throw new ArgumentException("--loads and --rates exclude each other.");
        }

        double seconds = CommandLine.Number(args, "--seconds") ?? 60;
        int rank = CommandLine.Int(args, "--rank", 16, min: 1);
        return new ServeSettings
        {
            Model = ModelChoice.Parse(args),
            Device = DeviceChoice.Parse(args),
            DeviceBytes = CommandLine.Bytes(args, "--device-bytes"),
            Trace = CommandLine.Text(args, "--trace"),
            Modes =
            [
                .. (CommandLine.Text(args, "--modes") ?? modes).Split(',').Distinct().Select(modeOf),
            ],
            Loads = CommandLine.Has(args, "--rates")
                ? []
                : [.. (CommandLine.Text(args, "--loads") ?? "light,medium,heavy").Split(',').Select(LoadOf)],
            Rates = CommandLine.Text(args, "--rates") is string rates
                ? [.. rates.Split(',').Select(r => CommandLine.Positive("--rates", r))]
                : [],
            Seconds = seconds,
            Rounds = CommandLine.Int(args, "--rounds", 1, min: 1),
            DrainSeconds = CommandLine.Number(args, "--drain-seconds") ?? seconds,
            Threads = CommandLine.Int(args, "--threads", 2, min: 1),
            TpotTarget = CommandLine.Number(args, "--tpot-ms") / 1e3,
            TtftTarget = CommandLine.Number(args, "--ttft-ms") / 1e3,
            Weights = CommandLine.WeightType(args, "--weights"),
            Lengths = new TraceLengths(
                CommandLine.Number(args, "--length-factor") ?? 1, CommandLine.Int(args, "--max-prompt", 128, min: 1),
                CommandLine.Int(args, "--max-answer", 64, min: 1)),
            StartSecond = CommandLine.Has(args, "--start-second") ? CommandLine.Int(args, "--start-second", 0, min: 0) : null,
            Sequences = CommandLine.Int(args, "--sequences", 16, min: 1),
            StepTokens = CommandLine.Int(args, "--step-tokens", 256, min: 1),
            Data = CommandLine.Text(args, "--data"),
            Lora = new LoraConfig
            {
                Rank = rank,
                Alpha = 16,
                TargetModules = (CommandLine.Text(args, "--target-modules") ?? "down_proj").Split(','),
            },
            SampleTokens = CommandLine.Int(args, "--sample-tokens", 256, min: 2),
            Accumulation = CommandLine.Int(args, "--accumulation", 8, min: 1),
            Seed = (ulong)CommandLine.Int(args, "--seed", 1, min: 0),
            JsonFile = CommandLine.Text(args, "--json"),
            HtmlFile = CommandLine.Text(args, "--html"),
        };
    }

    /// <summary>Whose arrivals to scale.</summary>
    /// <exception cref="InvalidFileException">A broken trace.</exception>
    public ArrivalTrace ReadTrace() => Trace is null ? ArrivalTrace.Drawn(Seed) : ArrivalTrace.Read(Trace);

    /// <summary>The arrivals of one window.</summary>
    public ArrivalTrace Window(ArrivalTrace trace, double rate) => trace.Scaled(rate, Seconds, Seed, StartSecond, Lengths);

    /// <summary>The loads that are asked for, with their arrivals a second.</summary>
    public IReadOnlyList<(string Name, double Rate)> LoadsOf(LiveCapacity capacity) => Rates.Count > 0
        ? [.. Rates.Select(rate => (string.Create(CultureInfo.InvariantCulture, $"{rate} req/s"), rate))]
        : [.. Loads.Select(load => (load.Name, load.Share * capacity.RequestsPerSecond))];

    /// <summary>For the report of a real run.</summary>
    public IReadOnlyList<(string Name, string Value)> Describe() =>
    [
        .. DescribeLoad(),
        ("backend", $"{(Device.IsTorch ? "torch" : "managed")}, {Device.Name}{(Device.Bf16Kv ? ", BF16 KV cache" : "")}" +
            (Device.Bf16Activations ? ", BF16 activations" : "")),
        ("weights", Weights?.ToString() ?? "as stored"),
        ("adapter", Lora.Describe()),
        ("answers", string.Create(CultureInfo.InvariantCulture, $"up to {DrainSeconds} s after a window to end")),
    ];

    /// <summary>For the report of a run, real or simulated.</summary>
    public IReadOnlyList<(string Name, string Value)> DescribeLoad() =>
    [
        ("model", Model.Name),
        ("trace", Trace is null ? "arrivals and lengths at random" : Path.GetFileName(Trace)),
        ("lengths", string.Create(
            CultureInfo.InvariantCulture,
            $"times {Lengths.Factor}, prompts of at most {Lengths.MaxPrompt} and answers of at most {Lengths.MaxAnswer} tokens")),
        ("window", string.Create(CultureInfo.InvariantCulture, $"{Rounds} times {Seconds} s")),
        ("threads", string.Create(CultureInfo.InvariantCulture, $"{Threads}; split {ServingThreads} + {TrainingThreads}")),
        ("limits", string.Create(CultureInfo.InvariantCulture, $"{Sequences} sequences, {StepTokens} tokens a step")),
        ("finetuning", string.Create(
            CultureInfo.InvariantCulture,
            $"samples of {(Data is null ? "" : "at most ")}{SampleTokens} tokens " +
            $"{(Data is null ? "at random" : $"of {Path.GetFileName(Data)}")}; {Accumulation} to an optimizer step")),
        ("seed", Seed.ToString(CultureInfo.InvariantCulture)),
    ];

    private static (string Name, double Share) LoadOf(string name)
    {
        int index = Array.FindIndex(NamedLoads, l => l.Name == name);
        return index >= 0 ? NamedLoads[index] : throw new ArgumentException($"--loads: '{name}' is none of light, medium, heavy.");
    }
}
