using System.Globalization;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>Which engines a mode needs.</summary>
internal enum ServingLayout
{
    /// <summary>One engine serves and trains.</summary>
    Shared,

    /// <summary>One engine that serves; nothing is trained.</summary>
    Serving,

    /// <summary>One engine that trains; nothing arrives.</summary>
    Training,

    /// <summary>One engine serves, another trains, each with a part of the threads: k of n machines, a thread a machine.</summary>
    Split,

    /// <summary>One engine serves, another trains, each with all threads: the operating system shares the processors among them.</summary>
    Spatial,
}

/// <summary>A way to share one machine that the serving verb compares.</summary>
/// <param name="Name">As given on the command line.</param>
/// <param name="Layout">Which engines it needs.</param>
/// <param name="Policy">The rule of the engine that serves.</param>
internal sealed record ServingMode(string Name, ServingLayout Layout, SharingPolicy Policy)
{
    /// <summary>Layers backward in a step of the released code (paper.md g.2: 2 for the 8B model).</summary>
    private const int BackwardLayers = 2;

    /// <summary>What is compared when nothing is asked for.</summary>
    public const string Defaults =
        "co-serving,inference-only,finetune-only,temporal-64,temporal-128,temporal-512,temporal-dynamic,fixed-budget,spatial,split";

    /// <summary>What is compared when nothing is asked of a simulation.</summary>
    public const string SimulatedDefaults = OracleName + "," + Defaults;

    private const string OracleName = "oracle";

    /// <summary>Co-serving by an engine that knows what each step will take; only where step times are simulated.</summary>
    public static ServingMode Oracle { get; } = new(OracleName, ServingLayout.Shared, SharingPolicy.CoServing);

    public bool Serves => Layout != ServingLayout.Training;

    public bool Trains => Layout != ServingLayout.Serving;

    /// <summary>The mode of that name.</summary>
    /// <exception cref="ArgumentException">There is none.</exception>
    public static ServingMode Parse(string name) => name switch
    {
        "co-serving" => new ServingMode(name, ServingLayout.Shared, SharingPolicy.CoServing),
        "inference-only" => new ServingMode(name, ServingLayout.Serving, SharingPolicy.InferenceOnly),
        "finetune-only" => new ServingMode(name, ServingLayout.Training, SharingPolicy.CoServing),
        "fixed-budget" => new ServingMode(name, ServingLayout.Shared, SharingPolicy.FixedBudget(BackwardLayers)),
        "spatial" => new ServingMode(name, ServingLayout.Spatial, SharingPolicy.InferenceOnly),
        "split" => new ServingMode(name, ServingLayout.Split, SharingPolicy.InferenceOnly),
        _ when Temporal(name) is SharingPolicy policy => new ServingMode(name, ServingLayout.Shared, policy),
        _ when NumberBehind("fixed-budget-", name) is int layers =>
            new ServingMode(name, ServingLayout.Shared, SharingPolicy.FixedBudget(layers)),
        _ => throw new ArgumentException($"'{name}' is no mode; there are {Defaults}, and temporal-N and fixed-budget-N for any N."),
    };

    /// <summary>The mode of that name, <see cref="Oracle"/> among them.</summary>
    /// <exception cref="ArgumentException">There is none.</exception>
    public static ServingMode ParseSimulated(string name) => name == OracleName ? Oracle : Parse(name);

    /// <summary>The policy of "temporal-N" for any N, or of "temporal-dynamic"; null for another name.</summary>
    public static SharingPolicy? Temporal(string name) =>
        name == "temporal-dynamic" ? SharingPolicy.DynamicTemporal()
        : NumberBehind("temporal-", name) is int steps ? SharingPolicy.Temporal(steps)
        : null;

    private static int? NumberBehind(string prefix, string name) =>
        name.StartsWith(prefix, StringComparison.Ordinal) &&
        int.TryParse(name.AsSpan(prefix.Length), NumberStyles.None, CultureInfo.InvariantCulture, out int number) && number >= 1
            ? number
            : null;
}
