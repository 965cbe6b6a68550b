using FlexLLM.Adapters;
using FlexLLM.Execution;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Finetuning;

/// <summary>What the optimizer steps of a job see and do not see of each other.</summary>
internal sealed record TrainingPlan
{
    public required IReadOnlyList<TrainingSample> Samples { get; init; }

    public int Epochs { get; init; } = 1;

    /// <summary>Samples to one optimizer step.</summary>
    public int GradientAccumulation { get; init; } = 1;

    public ulong? ShuffleSeed { get; init; }

    public required OptimizerOptions Optimizer { get; init; }
}

/// <summary>
/// The device side of one finetuning job: master weights, gradients, optimizer state and the activations of the sample in
/// progress. Each call does one piece of work at the cursor; between calls the job can wait as long as it likes.
/// </summary>
internal sealed class TrainingRun : IDisposable
{
    private readonly LoadedModel _model;
    private readonly AdapterGradients _gradients;
    private readonly float[] _losses; // Where those of a sample are read to.
    private readonly ResourceSet _owned = new();
    private ActivationStore? _store;
    private ActivationStore? _ahead;
    private bool _ownsAdapter;
    private double _groupLoss;
    private double _aheadLoss;

    /// <summary>
    /// Allocates everything the job will need. The adapter (its master weights) becomes this run's, and is gone when this fails.
    /// </summary>
    public TrainingRun(LoadedModel model, PeftAdapter adapter, TrainingPlan plan, TrainingProgram? program = null)
    {
        (_model, Adapter, _ownsAdapter) = (model, adapter, true);
        try
        {
            Program = program ?? model.CompileTraining(adapter.Networks);
            Cursor = new TrainingCursor(
                plan.Samples, plan.Epochs, plan.GradientAccumulation, plan.ShuffleSeed, model.Config.LayerCount, Program.LowestLayer);
            _losses = new float[plan.Samples.Max(s => s.Ids.Length)];
            Unpark();
            _gradients = _owned.Add(new AdapterGradients(model.Backend, adapter));
            Optimizer = _owned.Add(new AdapterOptimizer(model.Backend, plan.Optimizer, adapter, _gradients));
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public PeftAdapter Adapter { get; }

    public TrainingProgram Program { get; }

    public TrainingCursor Cursor { get; }

    public AdapterOptimizer Optimizer { get; }

    /// <summary>Gradients of the group in progress.</summary>
    public AdapterGradients Gradients => _gradients;

    /// <summary>Mean loss per target of the last complete group, measured before its step; NaN before this run's first.</summary>
    public double LastLoss { get; private set; } = double.NaN;

    /// <summary>Tokens whose forward pass is done, each counted once.</summary>
    public long TokensDone { get; private set; }

    /// <summary>Longest sample.</summary>
    public int TokensMax => _losses.Length;

    /// <summary>False while the run is parked and holds nothing for a sample.</summary>
    public bool HasArenas => _store is not null;

    /// <summary>Whether the run holds room for a second sample.</summary>
    public bool RunsAhead => _ahead is not null;

    /// <summary>
    /// What the run holds, in the rows of <see cref="MemoryPlan.OfJob"/>; the workspace of the backward pass is that pass's.
    /// </summary>
    public MemoryTable Memory()
    {
        int tensors = Adapter.Tensors().Count();
        return new MemoryTable(
        [
            .. _store?.Memory() ?? [],
            .. _ahead?.Memory() ?? [],
            new(MemoryUse.AdapterWeights, "tensors", tensors, Adapter.Bytes),
            new(MemoryUse.AdapterGradients, "tensors", tensors, _gradients.Bytes),
            new(MemoryUse.OptimizerState, "tensors", Optimizer.State().Count(), Optimizer.Bytes),
        ]);
    }

    /// <summary>
    /// Gives back what a sample keeps between its windows, where that can be made again: in the forward phase, which then starts
    /// over. Returns the tokens that will go through it a second time, or null where the run keeps everything.
    /// </summary>
    public int? Park()
    {
        if (_store is null || Cursor.Phase != TrainingPhase.Forward)
        {
            return null;
        }

        Check.That(_ahead is null, "it goes before the sample does");
        _store.Dispose();
        _store = null;
        int tokens = Cursor.RestartForward();
        TokensDone -= tokens;
        return tokens;
    }

    /// <summary>
    /// Takes room for a second sample, so that one can go forward while the other goes backward. It changes no bit: both see the same
    /// weights, and gradients are summed in the order of the samples.
    /// </summary>
    public void StartAhead()
    {
        Check.That(_store is not null && _ahead is null);
        _ahead = new ActivationStore(_model, Program, TokensMax);
    }

    /// <summary>Gives that room back. Returns the tokens that will go forward a second time.</summary>
    public int StopAhead()
    {
        _ahead?.Dispose();
        _ahead = null;
        int tokens = Cursor.DropAhead();
        TokensDone -= tokens;
        return tokens;
    }

    /// <summary>Takes what <see cref="Park"/> gave back.</summary>
    public void Unpark() => _store ??= new ActivationStore(_model, Program, TokensMax);

    /// <summary>Appends the next forward window to a batch.</summary>
    public void AddForwardWindow(TokenBatch batch, int tokens)
    {
        bool isAhead = Cursor.Phase == TrainingPhase.Backward;
        TrainingSample? sample = isAhead ? Cursor.Ahead : Cursor.Sample;
        ActivationStore? store = isAhead ? _ahead : _store;
        int start = isAhead ? Cursor.AheadDone : Cursor.PositionsDone;
        Check.That(Cursor.Phase != TrainingPhase.Done && sample is not null && start + tokens <= sample.Ids.Length);
        Check.That(store is not null, "a parked run does nothing");
        batch.AddWindow(
            sample.Ids.AsSpan(start, tokens), sample.Targets.AsMemory(start, tokens), start, store, Adapter,
            1f / Cursor.GroupTargets);
    }

    /// <summary>The window that was added last has run. Waits for the device where it was its sample's last: the losses are read.</summary>
    public void CompleteForward(int tokens)
    {
        TokensDone += tokens;
        if (Cursor.Phase == TrainingPhase.Backward)
        {
            if (Cursor.AdvanceAhead(tokens))
            {
                _aheadLoss = LossOf(_ahead!, Cursor.Ahead!);
            }
        }
        else if (Cursor.AdvanceForward(tokens))
        {
            _groupLoss += LossOf(_store!, Cursor.Sample);
        }
    }

    /// <summary>
    /// Runs one backward item: the last <paramref name="rows"/> rows left in the cursor's layer. True when it completed a
    /// group: the gradients stand, <see cref="Step"/> must follow.
    /// </summary>
    public bool RunBackward(BackwardPass pass, int rows)
    {
        Check.That(Cursor.Phase == TrainingPhase.Backward && rows <= Cursor.RowsLeft);
        Check.That(_store is not null, "a parked run does nothing");
        int index = Cursor.SampleIndex;
        pass.Run(_store, Cursor.Layer, Cursor.RowsLeft - rows, rows, Cursor.Sample.Ids.Length, Adapter, _gradients);
        bool isGroupDone = Cursor.AdvanceBackward(rows);
        if (Cursor.SampleIndex != index && _ahead is not null)
        {
            (_store, _ahead) = (_ahead, _store);
            _groupLoss += Cursor.Phase == TrainingPhase.Backward ? _aheadLoss : 0; // All of it ran ahead.
        }

        return isGroupDone;
    }

    /// <summary>Updates the adapter with the group's gradients and moves on.</summary>
    public void Step()
    {
        foreach ((int site, int index) in PartialGradients())
        {
            Moves.Run(_model.Backend, MoveKind.AllReduce, _gradients[site][index], _gradients[site][index]);
        }

        Optimizer.Step();
        _gradients.Zero(_model.Backend);
        LastLoss = _groupLoss;
        _groupLoss = 0;
        Cursor.NextSample();
    }

    /// <summary>Goes on after a number of steps that an earlier run of the same plan did.</summary>
    public void ResumeAfter(int steps)
    {
        Cursor.SeekToStep(steps);
        Optimizer.Steps = steps;
        _gradients.Zero(_model.Backend);
        _groupLoss = 0;
    }

    /// <summary>The adapter becomes the caller's: this run's disposal leaves it alone.</summary>
    public PeftAdapter Detach()
    {
        Check.That(_ownsAdapter);
        _ownsAdapter = false;
        return Adapter;
    }

    public void Dispose()
    {
        _store?.Dispose();
        _ahead?.Dispose();
        (_store, _ahead) = (null, null);
        _owned.Dispose();
        if (_ownsAdapter)
        {
            Adapter.Dispose();
            _ownsAdapter = false;
        }
    }

    // What a sample adds to its group's loss: summed in position order, whatever the windows were.
    private double LossOf(ActivationStore store, TrainingSample sample)
    {
        Span<float> losses = _losses.AsSpan(0, sample.Ids.Length);
        _model.Backend.Download(store.Losses.Slice(0, losses.Length), losses);
        double sum = 0;
        foreach (float loss in losses)
        {
            sum += loss;
        }

        return sum / Cursor.GroupTargets;
    }

    // What a rank of a group has of these is its share of a sum, which is due once a step.
    private IEnumerable<(int Site, int Index)> PartialGradients() => Adapter.SiteIndices.SelectMany(
        site => Adapter[site]!.Tensors.Index().Where(t => t.Item.GradientIsPartial).Select(t => (site, t.Index)));
}
