using FlexLLM.Backends.Null;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>The size of a batch, as its cost depends on it.</summary>
/// <param name="Rows">Inference and finetuning rows.</param>
/// <param name="Sampled">Rows whose logits are wanted.</param>
/// <param name="WindowRows">Finetuning rows among them, which have a loss.</param>
/// <param name="Positions">Keys read: the last position of each sequence, summed.</param>
/// <param name="Context">Positions that the rows attend, summed.</param>
internal readonly record struct BatchWork(double Rows, double Sampled, double WindowRows, double Positions, double Context)
{
    public static BatchWork Of(StepPlan plan)
    {
        (double rows, double windowRows, double positions) = (0, 0, 0);
        foreach (InferenceWork work in plan.Inference)
        {
            rows += work.Tokens;
            positions += work.ContextLength + work.Tokens;
        }

        StepFeatures features = plan.Features;
        foreach (ForwardWindow window in plan.Forward)
        {
            windowRows += window.Tokens;
        }

        // The last row of a window attends all that the window reads.
        positions += windowRows == 0 ? 0 : (features.ForwardContext / windowRows) + ((windowRows - 1) / 2);
        return new BatchWork(
            rows + windowRows, features.SampledRows, windowRows, positions, features.InferenceContext + features.ForwardContext);
    }
}

/// <summary>
/// Seconds of a batch and of a backward item: what the Null backend charges for them call by call, summed in closed form over the
/// operations of a dense decoder with a LoRA bypass at down_proj (the bypass itself is left out: 0.1 % of a layer).
/// </summary>
internal sealed class StepCosts
{
    // Keys that a window reads, of a sample of 3,600 tokens.
    private const double WindowPositionsMean = 1800;

    private readonly NullMachine _machine;
    private readonly double _secondsPerItem;
    private readonly double _layerWeights;
    private readonly double _headWeights;
    private readonly double _queryWidth;
    private readonly double _keyWidth;
    private readonly double _elementsPerRow;
    private readonly int _layers;

    public StepCosts(ModelConfig config, NullMachine machine, double secondsPerItem = 0)
    {
        _machine = machine;
        _secondsPerItem = secondsPerItem;
        (double hidden, double inner) = (config.HiddenSize, config.IntermediateSize);
        _queryWidth = config.AttentionHeads * config.HeadDim;
        _keyWidth = config.KeyValueHeads * config.HeadDim;
        _layers = config.LayerCount;
        _layerWeights = (2 * hidden * (_queryWidth + _keyWidth)) + (3 * hidden * inner);
        _headWeights = hidden * config.VocabularySize;

        // Of a layer: two norms, seven products, rotation, store, attention, gate, two sums; each reads and writes its rows.
        _elementsPerRow = (17 * hidden) + (8 * _queryWidth) + (10 * _keyWidth) + (6 * inner);
    }

    /// <summary>Overhead of a step, whatever is in it: without requests a layer backward takes the authors 26 ms, not 5 (e.4).</summary>
    public double SecondsPerStep => _machine.SecondsPerBatch;

    public static StepCosts Of(SimulatedModel model) => new(model.Config, model.Machine, model.Fit.SecondsPerItem);

    /// <summary>Seconds of a step's batch; nothing where it has no rows.</summary>
    public double Batch(in BatchWork work)
    {
        if (work.Rows <= 0)
        {
            return 0;
        }

        // A loss takes the head forward, and backward to its input.
        double head = 2 * _headWeights * (work.Sampled + (2 * work.WindowRows));
        double flops = (_layers * ((2 * _layerWeights * work.Rows) + (4 * _queryWidth * work.Context))) + head;
        double weights = (_layers * _layerWeights) + (work.Sampled > 0 ? _headWeights : 0) + (work.WindowRows > 0 ? 2 * _headWeights : 0);
        double elements = _layers * ((_elementsPerRow * work.Rows) + (2 * _keyWidth * work.Positions));
        return _machine.SecondsPerBatch + Seconds(flops, (2 * weights) + (_machine.ElementBytes * elements));
    }

    /// <summary>
    /// Seconds of rows [start, start + rows) of one layer backward: products with the frozen weights, and of attention five.
    /// </summary>
    /// <param name="start">First row.</param>
    /// <param name="rows">Rows.</param>
    /// <param name="goesOn">The rows belong to one call with the item before it, which has read the weights.</param>
    public double Item(double start, double rows, bool goesOn = false)
    {
        double context = rows * (start + ((rows + 1) / 2));
        double flops = (2 * _layerWeights * rows) + (10 * _queryWidth * context);
        double elements = (2 * _elementsPerRow * rows) + (6 * _keyWidth * (start + rows));
        return goesOn
            ? Seconds(flops, _machine.ElementBytes * elements)
            : _secondsPerItem + Seconds(flops, (2 * _layerWeights) + (_machine.ElementBytes * elements));
    }

    /// <summary>
    /// The latency model that knows this machine: each term is what one more of its unit costs. It is off by what its features do not
    /// tell: a window may stand anywhere in its sample.
    /// </summary>
    public LatencyModel Exact()
    {
        Check.That(!_machine.Overlaps); // Else the terms of a step do not add up.
        double row1 = Batch(new BatchWork(1, 0, 0, 0, 0));
        double row = Batch(new BatchWork(2, 0, 0, 0, 0)) - row1;
        double headRow = Batch(new BatchWork(1, 2, 0, 0, 0)) - Batch(new BatchWork(1, 1, 0, 0, 0));
        double windowRow = Batch(new BatchWork(1, 0, 2, 0, 0)) - Batch(new BatchWork(1, 0, 1, 0, 0));
        double key = Batch(new BatchWork(1, 0, 0, 1, 0)) - row1;
        double pair = Batch(new BatchWork(1, 0, 0, 0, 1)) - row1;
        double item = Item(0, 0);
        double itemPair = Item(0, 2) - (2 * Item(0, 1)) + item;
        LatencyCoefficients coefficients = LatencyCoefficients
            .Linear(
                step: SecondsPerStep, row: row, context: pair,
                forwardWindow: Batch(new BatchWork(1, 0, 1, 0, 0)) - row1 - windowRow + (key * WindowPositionsMean),
                forwardRow: row + windowRow, forwardContext: pair, backwardItem: item,
                backwardRow: Item(0, 1) - item - itemPair, backwardContext: itemPair)
            .With(LatencyTerm.RowsTo1, row1 - SecondsPerStep)
            .With(LatencyTerm.Positions, key)
            .With(LatencyTerm.Head, Batch(new BatchWork(1, 1, 0, 0, 0)) - row1 - headRow)
            .With(LatencyTerm.HeadRow, headRow);
        return new LatencyModel(coefficients, Correction: 1.0, Tail: 1.0);
    }

    private double Seconds(double flops, double bytes)
    {
        double arithmetic = flops / _machine.FlopsPerSecond;
        double traffic = bytes / _machine.BytesPerSecond;
        return _machine.Overlaps ? Math.Max(arithmetic, traffic) : arithmetic + traffic;
    }
}

/// <summary>Seconds that a simulated machine takes for the parts of a planned step.</summary>
internal abstract class StepTimes
{
    /// <summary>Seconds of the plan's batch.</summary>
    public abstract double Batch(StepPlan plan);

    /// <summary>Seconds of the plan's <paramref name="index"/>-th backward item.</summary>
    public abstract double Item(StepPlan plan, int index);

    /// <summary>What an engine believes when it has measured this machine.</summary>
    public abstract LatencyModel Calibrated { get; }
}

/// <summary>Times from the closed form of a machine.</summary>
/// <param name="costs">The closed form.</param>
/// <param name="wholeLayers">
/// A layer goes backward in one call, into however many items a plan cuts it, and all layers of a sample in one iteration, where no
/// request is beside them: what the authors' system does.
/// </param>
internal sealed class RooflineTimes(StepCosts costs, bool wholeLayers = false) : StepTimes
{
    public override LatencyModel Calibrated { get; } = costs.Exact();

    public override double Batch(StepPlan plan) => costs.Batch(BatchWork.Of(plan));

    public override double Item(StepPlan plan, int index)
    {
        BackwardWindow item = plan.Backward[index];
        bool goesOn = wholeLayers && index > 0 && plan.Backward[index - 1].Layer == item.Layer;
        bool isFirst = index == 0 && plan.Inference.IsEmpty && plan.Forward.IsEmpty && !wholeLayers;
        return costs.Item(item.RowStart, item.RowCount, goesOn) + (isFirst ? costs.SecondsPerStep : 0);
    }
}

/// <summary>Times from a profile that was measured on a real machine, a sum over what is in a step.</summary>
internal sealed class ProfileTimes(LatencyModel profile) : StepTimes
{
    public override LatencyModel Calibrated => profile;

    /// <summary>The same on a share of the machine's speed.</summary>
    public static ProfileTimes OnShare(in LatencyModel profile, double share) =>
        new(profile with { Correction = profile.Correction / share });

    public override double Batch(StepPlan plan)
    {
        double seconds = profile.Expect(plan.Features).TotalSeconds;
        for (int i = 0; i < plan.Backward.Length; i++)
        {
            seconds -= Item(plan, i);
        }

        return Math.Max(seconds, 0);
    }

    public override double Item(StepPlan plan, int index)
    {
        BackwardWindow item = plan.Backward[index];
        StepFeatures alone = default(StepFeatures).WithBackward(item.RowStart, item.RowCount);
        return (profile.Expect(alone) - profile.Expect(default)).TotalSeconds;
    }
}
