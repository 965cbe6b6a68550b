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
/// <param name="jitter">Deviation of the logarithm of a part's time; short parts that follow each other share their chance.</param>
/// <param name="clock">The clock that it moves.</param>
/// <param name="seed">Seed of the chance.</param>
internal sealed class SimulatedBackend(StepTimes times, int layers, double jitter, ManualClock clock, ulong seed)
    : NullBackend(new NullMachine { FlopsPerSecond = 1, BytesPerSecond = 1 }, clock, seed)
{
    private const double JitterSeconds = 10e-3;

    private SeededRandom _chance = new(~seed);
    private double _slowness = 1.0;
    private double _slownessSecondsLeft;
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
            _layerSeconds = plan.Features.BatchRows > 0 ? ByChance(times.Batch(plan)) / layers : 0;
        }

        if (operation == nameof(AppendKv))
        {
            return _layerSeconds;
        }

        Check.That(_items < plan.Backward.Length, "one bypass an item");
        return ByChance(times.Item(plan, _items++));
    }

    private double ByChance(double seconds)
    {
        if (_slownessSecondsLeft <= 0)
        {
            _slowness = Math.Exp(jitter * _chance.NextGaussian());
            _slownessSecondsLeft = JitterSeconds;
        }

        _slownessSecondsLeft -= seconds * _slowness;
        return seconds * _slowness;
    }
}
