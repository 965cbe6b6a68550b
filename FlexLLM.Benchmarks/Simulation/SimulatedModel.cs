using FlexLLM.Backends.Null;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>What a device can do at most, by its data sheet.</summary>
/// <param name="Name">Its name.</param>
/// <param name="FlopsPerSecond">Dense BF16 products with FP32 sums.</param>
/// <param name="BytesPerSecond">Traffic to its memory.</param>
internal sealed record SimulatedGpu(string Name, double FlopsPerSecond, double BytesPerSecond)
{
    /// <summary>NVIDIA A100-80GB SXM, the paper's machine (paper.md g.1).</summary>
    public static SimulatedGpu A100 { get; } = new("A100-80GB SXM", 312e12, 2.039e12);
}

/// <summary>
/// What a serving system makes of a device: two shares of its peaks, and what it adds to them. Found by <see cref="Calibration"/>.
/// </summary>
/// <param name="TensorShare">Of the peak arithmetic.</param>
/// <param name="BandwidthShare">Of the peak bandwidth.</param>
/// <param name="SecondsPerBatch">Overhead of a step: host, launches, and what ranks wait for each other in all layers.</param>
/// <param name="SecondsPerItem">Overhead of one layer backward.</param>
internal sealed record MachineFit(double TensorShare, double BandwidthShare, double SecondsPerBatch, double SecondsPerItem = 0)
{
    /// <summary>
    /// The ranks of a pipeline as one machine. Arithmetic and traffic do not overlap: with few rows a product reaches neither
    /// peak, and the sum of both is what the authors' figures follow (see <see cref="Calibration"/>).
    /// </summary>
    public NullMachine Of(SimulatedGpu gpu, int ranks) => new()
    {
        FlopsPerSecond = ranks * TensorShare * gpu.FlopsPerSecond,
        BytesPerSecond = ranks * BandwidthShare * gpu.BytesPerSecond,
        SecondsPerBatch = SecondsPerBatch,
        Overlaps = false,
        ElementBytes = 2,
    };
}

/// <summary>A model on one pipeline of the paper's evaluation (paper.md g.1 to g.3).</summary>
internal sealed record SimulatedModel
{
    /// <summary>Short name: "8b", "14b", "32b", "70b".</summary>
    public required string Name { get; init; }

    public required string Title { get; init; }

    public required ModelConfig Config { get; init; }

    /// <summary>GPUs of a pipeline.</summary>
    public required int Ranks { get; init; }

    /// <summary>What the authors' system makes of the machine.</summary>
    public required MachineFit Fit { get; init; }

    /// <summary>What the system makes of it that the paper splits machines with (vLLM, eager); null where none was reported.</summary>
    public MachineFit? ServerFit { get; init; }

    /// <summary>TPOT target in seconds (the paper's text; its scripts use 45 ms for 8B).</summary>
    public double TpotTarget { get; init; } = 0.075;

    /// <summary>Tokens in the KV cache.</summary>
    public int KvTokens { get; init; } = 70_000;

    public SimulatedGpu Gpu { get; init; } = SimulatedGpu.A100;

    public NullMachine Machine => Fit.Of(Gpu, Ranks);

    /// <summary>The same model in the other system.</summary>
    public SimulatedModel AsServer() => this with { Fit = ServerFit ?? Fit };

    public override string ToString() => Name;

    /// <summary>The same model on a share of the machine's rates.</summary>
    public SimulatedModel OnShare(double share) => this with
    {
        Fit = Fit with { TensorShare = Fit.TensorShare * share, BandwidthShare = Fit.BandwidthShare * share },
    };

    /// <summary>The paper's three, smallest first.</summary>
    public static IReadOnlyList<SimulatedModel> Paper { get; } =
    [
        new()
        {
            Name = "8b",
            Title = "Llama-3.1-8B, TP 1",
            Config = ModelShapes.Of("llama-3.1-8b"),
            Ranks = 1,
            TpotTarget = 0.050,
            Fit = new MachineFit(0.76, 0.85, 8e-3),
            ServerFit = new MachineFit(0.62, 0.85, 3.5e-3),
        },
        new()
        {
            Name = "14b",
            Title = "Qwen2.5-14B, TP 2",
            Config = ModelShapes.Of("qwen2.5-14b"),
            Ranks = 2,
            Fit = new MachineFit(0.58, 0.85, 34e-3),
            ServerFit = new MachineFit(0.58, 0.85, 15.5e-3),
        },
        new()
        {
            Name = "32b",
            Title = "Qwen2.5-32B, TP 4",
            Config = ModelShapes.Of("qwen2.5-32b"),
            Ranks = 4,
            KvTokens = 60_000,
            Fit = new MachineFit(0.65, 0.85, 31e-3),
            ServerFit = new MachineFit(0.64, 0.85, 14.5e-3),
        },
    ];

    /// <summary>The model whose latency function the authors' profile holds (paper.md e.4).</summary>
    public static SimulatedModel Profiled { get; } = new()
    {
        Name = "70b",
        Title = "Llama-3.1-70B, TP 4",
        Config = ModelShapes.Of("llama-3.1-70b"),
        Ranks = 4,
        Fit = new MachineFit(0.38, 0.85, 28e-3, 0.6e-3),
    };

    public static SimulatedModel Of(string name) => Paper.FirstOrDefault(m => m.Name == name)
        ?? throw new ArgumentException($"'{name}' is no simulated model; known are {string.Join(", ", Paper.Select(m => m.Name))}.");
}
