using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Graph.Parallelization;

/// <summary>Shapes, machines and look-ups that the fixtures share.</summary>
internal static class Plans
{
    /// <summary>About one accelerator of a fast node.</summary>
    public static readonly MachineModel FastLink = new()
    {
        FlopsPerSecond = 4e14,
        MemoryBytesPerSecond = 3e12,
        LinkLatencySeconds = 8e-6,
        LinkBytesPerSecond = 3e11,
        MemoryBytes = 8e9,
        BytesPerElement = 2,
    };

    /// <summary>The same with a network instead of a switch.</summary>
    public static readonly MachineModel SlowLink = FastLink with { LinkBytesPerSecond = 1e10, LinkLatencySeconds = 3e-5 };

    /// <summary>
    /// One of each PEFT method, and every kind of operator in every place: biases on partials, vectors on partials, on tokens and
    /// on slices. Input and output are equally wide, so that each fits each tap.
    /// </summary>
    private static readonly Dictionary<string, Bypass> SmallBypasses = new()
    {
        ["lora"] = Bypass.Lora(16, 16, 8),
        ["adapter"] = Bypass.Adapter(16, 16, 8),
        ["serial adapter"] = Bypass.SerialAdapter(16, 8),
        ["scale"] = Bypass.Scale(16),
        ["everything"] = new(
        [
            new("A", BypassOperatorKind.Linear, 16, 8, HasBias: true),
            new("s", BypassOperatorKind.ElementwiseLinear, 8, 8),
            new("B", BypassOperatorKind.Linear, 8, 16, HasBias: true),
            new("t", BypassOperatorKind.ElementwiseLinear, 16, 16),
        ]),
    };

    public static IEnumerable<string> BypassNames => SmallBypasses.Keys;

    public static IEnumerable<string> TapNames => BypassTap.All.Select(tap => tap.Name);

    public static Bypass Small(string name) => SmallBypasses[name];

    public static BypassTap Tap(string name) => BypassTap.All.Single(tap => tap.Name == name);

    public static BypassPlan Find(Bypass bypass, BypassTap tap, int ranks, string name) =>
        Of(tap, bypass, ranks, SearchRules.Full).Plans.Single(entry => entry.Name == name).Plan;

    public static Planning Of(BypassTap tap, Bypass bypass, int ranks, SearchRules? rules = null) =>
        BypassPlanner.Plan(tap, bypass, new PlanTokens(512, 4096), ranks, FastLink, rules);

    public static IEnumerable<string> Undominated(Planning planning) =>
        planning.Plans.Where(entry => entry.DominatedBy is null).Select(entry => entry.Name);

    /// <summary>A LoRA whose rank is narrow even beside one rank's slice of the layer: 2 r p at most min(m, n).</summary>
    public static (int Input, int Output, int Rank, int Ranks) NarrowLora(ref SeededRandom random)
    {
        int ranks = random.Next(2, 9);
        int rank = ranks * random.Next(1, 9);
        int least = 2 * rank;
        return (ranks * (least + random.Next(200)), ranks * (least + random.Next(200)), rank, ranks);
    }
}
