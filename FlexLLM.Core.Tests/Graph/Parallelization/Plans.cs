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
