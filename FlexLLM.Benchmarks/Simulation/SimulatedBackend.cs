using FlexLLM.Backends.Null;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>
/// The Null backend with the price of a step's parts on two calls: a batch appends keys and values once a layer, the LoRA bypass at
/// down_proj is in every backward item. All other calls check their shapes and are free, so that a small stand-in for the model
/// serves, and the step takes the real one's time.
/// </summary>
/// <param name="times">What the parts take.</param>
/// <param name="layers">Layers of the stand-in.</param>
/// <param name="machine">How much steps differ by chance.</param>
/// <param name="clock">The clock that it moves.</param>
/// <param name="seed">Seed of the chance.</param>
internal sealed class SimulatedBackend(StepTimes times, int layers, NullMachine machine, ManualClock clock, ulong seed)
    : NullBackend(machine, clock, seed)
{
    private StepPlan? _plan;
    private double _layerSeconds;
    private int _items;

    /// <summary>The plan that the engine carries out; null before its first step.</summary>
    public Func<StepPlan?> Plan { get; set; } = () => null;

    /// <summary>What happens outside while the engine waits for the device.</summary>
    public Action Waits { get; set; } = () => { };

    public override void Synchronize() => Waits();

    protected override double SecondsOf(string operation, double flops, double bytes)
    {
        if (operation is not (nameof(AppendKv) or nameof(LoraBypassBackward)) || Plan() is not StepPlan plan)
        {
            return 0;
        }

        if (!ReferenceEquals(plan, _plan))
        {
            (_plan, _items) = (plan, 0);
            _layerSeconds = plan.Features.BatchRows > 0 ? base.ByChance(times.Batch(plan)) / layers : 0;
        }

        if (operation == nameof(AppendKv))
        {
            return _layerSeconds;
        }

        Check.That(_items < plan.Backward.Length, "one bypass an item");
        return base.ByChance(times.Item(plan, _items++));
    }

    // A batch has one chance for all its layers: it is in the price already.
    protected override double ByChance(double seconds) => seconds;
}
