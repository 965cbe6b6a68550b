using FlexLLM.Primitives;

namespace FlexLLM.Finetuning;

/// <summary>One tokenised sample. Targets[t] is the token that position t must predict, or -1 where no loss is asked.</summary>
internal sealed class TrainingSample
{
    public TrainingSample(int[] ids, int[] targets)
    {
        Check.That(ids.Length == targets.Length);
        Ids = ids;
        Targets = targets;
        TargetCount = targets.Count(t => t >= 0);
    }

    public int[] Ids { get; }

    public int[] Targets { get; }

    public int TargetCount { get; }

    /// <summary>Shifts labels once and for all: position t is asked for ids[t + 1] where that token carries loss.</summary>
    public static TrainingSample FromTokens(int[] ids, ReadOnlySpan<bool> carriesLoss)
    {
        Check.That(ids.Length == carriesLoss.Length);
        int[] targets = new int[ids.Length];
        for (int t = 0; t < ids.Length; t++)
        {
            targets[t] = t + 1 < ids.Length && carriesLoss[t + 1] ? ids[t + 1] : -1;
        }

        return new TrainingSample(ids, targets);
    }
}

/// <summary>What a job does next.</summary>
internal enum TrainingPhase
{
    Forward,
    Backward,
    Done,
}

/// <summary>
/// Where a finetuning job stands: epoch, sample, and the window inside it. Pure bookkeeping: it orders the work and never
/// touches a tensor, so a job can stop after any window and go on later.
/// </summary>
internal sealed class TrainingCursor
{
    private readonly IReadOnlyList<TrainingSample> _samples;
    private readonly int _epochs;
    private readonly int _accumulation;
    private readonly ulong? _shuffleSeed;
    private readonly int _topLayer;
    private readonly int _lowestLayer;
    private readonly int[] _order;
    private int _indexInEpoch;

    /// <param name="samples">Samples, each with at least one target.</param>
    /// <param name="epochs">Passes over all samples.</param>
    /// <param name="accumulation">Samples to one optimizer step; the last group of an epoch may be smaller.</param>
    /// <param name="shuffleSeed">Seed of the order of each epoch, or null for the given order.</param>
    /// <param name="layers">Decoder layers.</param>
    /// <param name="lowestLayer">Layer at which the backward pass ends.</param>
    public TrainingCursor(
        IReadOnlyList<TrainingSample> samples, int epochs, int accumulation, ulong? shuffleSeed, int layers, int lowestLayer)
    {
        Check.That(samples.Count > 0 && epochs > 0 && accumulation > 0);
        Check.That(samples.All(s => s.TargetCount > 0));
        _samples = samples;
        _epochs = epochs;
        _accumulation = accumulation;
        _shuffleSeed = shuffleSeed;
        _topLayer = layers - 1;
        _lowestLayer = lowestLayer;
        _order = new int[samples.Count];
        TokensTotal = samples.Sum(s => (long)s.Ids.Length) * epochs;
        StartEpoch();
    }

    public TrainingPhase Phase { get; private set; }

    /// <summary>0-based pass over the samples.</summary>
    public int Epoch { get; private set; }

    /// <summary>Optimizer steps done.</summary>
    public int Step { get; private set; }

    /// <summary>1-based pass that the last step belonged to; 1 before the first step.</summary>
    public int EpochOfLastStep => (Math.Max(0, Step - 1) / StepsPerEpoch) + 1;

    /// <summary>Optimizer steps of the whole job.</summary>
    public int Steps => StepsPerEpoch * _epochs;

    /// <summary>Place of the sample at work in the epoch's order.</summary>
    public int SampleIndex => _indexInEpoch;

    public TrainingSample Sample => _samples[_order[_indexInEpoch]];

    /// <summary>Forward: positions already computed.</summary>
    public int PositionsDone { get; private set; }

    /// <summary>Backward: the layer in progress.</summary>
    public int Layer { get; private set; }

    public int LowestLayer => _lowestLayer;

    /// <summary>Backward: rows [0, RowsLeft) of the layer are still to do, from the end.</summary>
    public int RowsLeft { get; private set; }

    /// <summary>Targets of the whole accumulation group: what losses and gradients are averaged over.</summary>
    public int GroupTargets
    {
        get
        {
            int targets = 0;
            for (int i = GroupStart; i < GroupEnd; i++)
            {
                targets += _samples[_order[i]].TargetCount;
            }

            return targets;
        }
    }

    /// <summary>
    /// Backward: the next sample of the same group, whose forward pass may run already, since no optimizer step lies between; else
    /// null.
    /// </summary>
    public TrainingSample? Ahead =>
        Phase == TrainingPhase.Backward && _indexInEpoch + 1 < GroupEnd ? _samples[_order[_indexInEpoch + 1]] : null;

    /// <summary>Positions of <see cref="Ahead"/> that are computed already.</summary>
    public int AheadDone { get; private set; }

    /// <summary>Tokens of the whole job, each counted once.</summary>
    public long TokensTotal { get; }

    private int StepsPerEpoch => (_samples.Count + _accumulation - 1) / _accumulation;

    private int GroupStart => _indexInEpoch / _accumulation * _accumulation;

    private int GroupEnd => Math.Min(GroupStart + _accumulation, _samples.Count);

    /// <summary>A forward window of that many tokens is done. True when it was the sample's last.</summary>
    public bool AdvanceForward(int tokens)
    {
        Check.That(Phase == TrainingPhase.Forward && tokens > 0 && PositionsDone + tokens <= Sample.Ids.Length);
        PositionsDone += tokens;
        if (PositionsDone < Sample.Ids.Length)
        {
            return false;
        }

        StartBackward();
        return true;
    }

    /// <summary>A forward window of <see cref="Ahead"/> is done. True when it was that sample's last.</summary>
    public bool AdvanceAhead(int tokens)
    {
        Check.That(Ahead is not null && tokens > 0 && AheadDone + tokens <= Ahead.Ids.Length);
        AheadDone += tokens;
        return AheadDone == Ahead.Ids.Length;
    }

    /// <summary>What was done of <see cref="Ahead"/> is lost. Returns its tokens.</summary>
    public int DropAhead()
    {
        int done = AheadDone;
        AheadDone = 0;
        return done;
    }

    /// <summary>The sample's forward phase begins again. Returns the tokens of it that were done.</summary>
    public int RestartForward()
    {
        Check.That(Phase == TrainingPhase.Forward);
        int done = PositionsDone;
        PositionsDone = 0;
        return done;
    }

    /// <summary>
    /// A backward window of that many rows is done. True when it completed the accumulation group: the caller updates the
    /// weights and calls <see cref="NextSample"/>; after a sample inside a group the next one starts by itself.
    /// </summary>
    public bool AdvanceBackward(int rows)
    {
        Check.That(Phase == TrainingPhase.Backward && rows > 0 && rows <= RowsLeft);
        RowsLeft -= rows;
        if (RowsLeft > 0)
        {
            return false;
        }

        if (Layer > _lowestLayer)
        {
            Layer--;
            RowsLeft = Sample.Ids.Length;
            return false;
        }

        if (_indexInEpoch + 1 < GroupEnd)
        {
            NextSample();
            return false;
        }

        Step++;
        return true;
    }

    /// <summary>Moves on to the next sample, epoch, or the end. What ran ahead of the sample before is done in it.</summary>
    public void NextSample()
    {
        PositionsDone = AheadDone;
        AheadDone = 0;
        RowsLeft = 0;
        Phase = TrainingPhase.Forward;
        if (++_indexInEpoch < _samples.Count)
        {
            if (PositionsDone == Sample.Ids.Length)
            {
                StartBackward();
            }

            return;
        }

        if (++Epoch == _epochs)
        {
            _indexInEpoch = _samples.Count - 1;
            Phase = TrainingPhase.Done;
            return;
        }

        StartEpoch();
    }

    /// <summary>Goes to the start of the group that follows the given number of steps (after a checkpoint was loaded).</summary>
    public void SeekToStep(int step)
    {
        Check.That(step >= 0 && step <= Steps);
        Step = step;
        Epoch = step / StepsPerEpoch;
        PositionsDone = 0;
        AheadDone = 0;
        RowsLeft = 0;
        if (Epoch == _epochs)
        {
            Phase = TrainingPhase.Done;
            return;
        }

        Phase = TrainingPhase.Forward;
        StartEpoch();
        _indexInEpoch = step % StepsPerEpoch * _accumulation;
    }

    private void StartBackward()
    {
        Phase = TrainingPhase.Backward;
        Layer = _topLayer;
        RowsLeft = Sample.Ids.Length;
    }

    // Each epoch has an order of its own that depends on the seed and the epoch alone, so that a resumed job sees the same one.
    private void StartEpoch()
    {
        _indexInEpoch = 0;
        for (int i = 0; i < _order.Length; i++)
        {
            _order[i] = i;
        }

        if (_shuffleSeed is ulong seed)
        {
            var random = new SeededRandom(seed + (0x9E3779B97F4A7C15 * (ulong)(Epoch + 1)));
            random.Shuffle(_order.AsSpan());
        }
    }
}
