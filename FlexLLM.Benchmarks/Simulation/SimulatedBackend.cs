using FlexLLM.Backends.Null;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>
/// The Null backend with the price of a step's parts on the two calls that each of them makes once: Gather begins every batch, the
/// LoRA bypass at down_proj is in every backward item. All other calls check their shapes and are free, so that a small
/// stand-in for the model serves, and the step takes the real one's time.
/// </summary>
internal sealed class SimulatedBackend(StepTimes times, NullMachine machine, ManualClock clock, ulong seed)
    : NullBackend(machine, clock, seed)
{
    private StepPlan? _plan;
    private int _items;

    /// <summary>The plan that the engine carries out; null before its first step.</summary>
    public Func<StepPlan?> Plan { get; set; } = () => null;

    protected override double SecondsOf(string operation, double flops, double bytes)
    {
        if (operation is not (nameof(Gather) or nameof(LoraBypassBackward)) || Plan() is not StepPlan plan)
        {
            return 0;
        }

        if (!ReferenceEquals(plan, _plan))
        {
            (_plan, _items) = (plan, 0);
        }

        if (operation == nameof(Gather))
        {
            return times.Batch(plan);
        }

        Check.That(_items < plan.Backward.Length, "one bypass an item");
        return times.Item(plan, _items++);
    }
}
