using FlexLLM.Backends.Null;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;

namespace FlexLLM.Tests.Simulation;

/// <summary>What is simulated, but for chance.</summary>
internal sealed record Scenario
{
    /// <summary>
    /// A quarter of the layers of a 16-layer model of LLaMA-3-8B's width, on an eighth of an A100 (half its peak arithmetic,
    /// two thirds of its bandwidth): a decode step takes about 13 ms, a row beyond the memory-bound ones 0.1 ms, as
    /// all 32 layers would on the whole.
    /// </summary>
    public static readonly ModelConfig Model = new()
    {
        Architecture = ModelArchitecture.Llama,
        HiddenSize = 4096,
        IntermediateSize = 14336,
        LayerCount = 4,
        AttentionHeads = 32,
        KeyValueHeads = 8,
        HeadDim = 128,
        VocabularySize = 16_000,
        MaxPositions = 2048,
    };

    public static readonly NullMachine EighthOfA100 = new()
    {
        FlopsPerSecond = 150e12 / 8,
        BytesPerSecond = 1.4e12 / 8,
        SecondsPerCall = 10e-6,
    };

    public required Workload Workload { get; init; }

    public NullMachine Machine { get; init; } = EighthOfA100;

    public ServiceLevelObjective Slo { get; init; } = new() { TimePerOutputToken = TimeSpan.FromMilliseconds(50) };

    public UnattainableSlo Unattainable { get; init; }

    /// <summary>Where warnings go.</summary>
    public ILogger Logger { get; init; } = NullLogger.Instance;

    /// <summary>Is told every operation of the backend before it runs.</summary>
    public Action<string>? Probe { get; init; }

    public SharingPolicy Sharing { get; init; } = SharingPolicy.CoServing;

    public int Jobs { get; init; } = 1;

    /// <summary>Shares of the jobs, by their order; what is not here has 1.</summary>
    public double[] JobWeights { get; init; } = [];

    /// <summary>Priorities of the jobs, by their order; what is not here has 0.</summary>
    public int[] JobPriorities { get; init; } = [];

    public int GradientAccumulation { get; init; } = 1;

    public int Samples { get; init; } = 32;

    /// <summary>Their shortest and, not reached, their longest, in tokens.</summary>
    public (int Min, int End) SampleTokens { get; init; } = (64, 1024);

    /// <summary>Many enough, and the job never ends.</summary>
    public int Epochs { get; init; } = 10_000;

    public bool PrefixCaching { get; init; } = true;

    public int KvTokens { get; init; } = 64 * 1024;

    /// <summary>Of a device that has nothing to do with the machine that simulates it.</summary>
    public long DeviceBytesMax { get; init; } = 80L << 30;
}
