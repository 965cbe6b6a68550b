using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Graph;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Engine;

/// <summary>What an engine without requests and jobs lends to its profiler.</summary>
internal sealed record ProfiledEngine(
    LoadedModel Model, StepLimits Limits, MemoryPlan Memory, DeviceBudget Budget, KvPool Pool, ForwardPass Forward, BackwardPass Backward,
    TokenBatch Batch, TimeProvider Clock);

/// <summary>Runs and times steps of throw-away tokens and of a throw-away finetuning job. All memory is given back.</summary>
internal sealed class StepTimer(ProfiledEngine engine)
{
    /// <summary>Longest and shortest sample of a job.</summary>
    public const int SampleTokensMax = 512;
    public const int SampleTokensMin = 8;

    private readonly TokenChooser _chooser = new(engine.Model.Backend, engine.Model.Config.VocabularySize, engine.Limits.SequencesMax);
    private readonly SamplingParameters _greedy = SamplingOptions.Greedy.Resolve(new SamplingDefaults(), engineSeed: 0);
    private readonly TokenHistory _history = new(countsTokens: false);
    private readonly int[] _ids = new int[engine.Limits.TokensPerStepMax];

    private int _blocksTouched;

    public ModelConfig Config => engine.Model.Config;

    public StepLimits Limits => engine.Limits;

    public TimeProvider Clock => engine.Clock;

    /// <summary>Longest sequence that the model and the cache take.</summary>
    public int PositionsMax =>
        Math.Min(engine.Pool.Blocks.BlocksTotal * DeviceKvCache.TokensPerBlock, engine.Model.PositionsMax);

    /// <summary>Requests that decode, all with this many tokens before.</summary>
    public static Inference[] Decodes(int count, int context) => [.. Enumerable.Repeat(new Inference(context, 1, true), count)];

    /// <summary>Whether limits and the cache have room for it.</summary>
    public bool Fits(Inference[] step) =>
        step.Length <= engine.Limits.SequencesMax && step.Sum(i => i.Rows) <= engine.Limits.TokensPerStepMax &&
        step.All(i => i.Start + i.Rows <= PositionsMax) &&
        step.Sum(i => BlockTable.BlocksFor(i.Start + i.Rows)) <= engine.Pool.Blocks.BlocksFree;

    /// <summary>Runs it unseen where it would use a part of the cache for the first time, which costs page faults.</summary>
    public void Touch(Inference[] step)
    {
        int blocks = step.Sum(i => BlockTable.BlocksFor(i.Start + i.Rows));
        if (blocks > _blocksTouched)
        {
            _blocksTouched = blocks;
            Measure(step, run: null, 0, []);
        }
    }

    /// <summary>
    /// Runs and times one step: rows of inference, forward tokens of the job and backward items of these rows. Its rows of the cache
    /// are given back.
    /// </summary>
    public (StepFeatures Features, TimeSpan Time) Measure(Inference[] inference, TrainingRun? run, int forward, int[] items)
    {
        StepFeatures features = default;
        BlockPool blocks = engine.Pool.Blocks;
        BlockTable[] tables = [.. inference.Select(_ => new BlockTable())];
        try
        {
            foreach ((Inference part, BlockTable table) in inference.Zip(tables))
            {
                Check.That(table.EnsureCapacity(part.Start + part.Rows, blocks));
                features = features.WithInference(part.Start, part.Rows, part.IsSampled ? 1 : 0);
            }

            long begun = engine.Clock.GetTimestamp();
            engine.Batch.Clear();
            foreach ((Inference part, BlockTable table) in inference.Zip(tables))
            {
                engine.Batch.AddInference(
                    _ids.AsSpan(0, part.Rows), part.Start, engine.Pool.Cache, table.Blocks, adapter: null, part.IsSampled ? 1 : 0);
            }

            if (forward > 0)
            {
                features = features.WithForward(run!.Cursor.PositionsDone, forward);
                run.AddForwardWindow(engine.Batch, forward);
            }

            RunBatch(features.SampledRows);
            if (forward > 0)
            {
                run!.CompleteForward(forward);
            }

            foreach (int rows in items)
            {
                features = features.WithBackward(run!.Cursor.RowsLeft - rows, rows);
                if (run.RunBackward(engine.Backward, rows))
                {
                    run.Step();
                }
            }

            engine.Model.Backend.Synchronize();
            return (features, engine.Clock.GetElapsedTime(begun));
        }
        finally
        {
            foreach (BlockTable table in tables)
            {
                table.Release(blocks);
            }
        }
    }

    private void RunBatch(int sampled)
    {
        if (engine.Batch.Rows == 0)
        {
            return;
        }

        TensorSlice logits = engine.Forward.Run(engine.Batch);
        _chooser.Clear();
        _chooser.Expect(_greedy);
        _chooser.Read(logits);
        for (int i = 0; i < sampled; i++)
        {
            _chooser.Choose(i, _greedy, _history);
        }
    }

    /// <summary>A job of one sample that never ends, or null where the device has no room for it.</summary>
    public TrainingRun? TryStart(int tokens)
    {
        LoadedModel model = engine.Model;
        int widest = Math.Min(model.Whole.HiddenSize, model.Whole.KeyValueHeads * model.Whole.HeadDim);
        var method = new LoraConfig { Rank = Math.Min(16, widest) };
        OptimizerOptions optimizer = new AdamWOptions();
        if (tokens < SampleTokensMin)
        {
            return null;
        }

        TrainingProgram program = model.CompileTraining(PeftAdapter.NetworksOf(method, model.Whole));
        long scratch = engine.Memory.ScratchBytes(trains: true) - engine.Memory.ScratchBytes(trains: false);
        int fitting = Bisection.Largest(
            tokens, n => engine.Memory.OfJob(program, method, optimizer.Moments, n).Bytes + scratch <= engine.Budget.BytesFree);
        if (fitting < SampleTokensMin)
        {
            return null;
        }

        TrainingRun? run = null;
        try
        {
            engine.Backward.Reserve(program);
            PeftAdapter adapter = PeftAdapter.CreateRandom(model.Backend, model.Whole, method, seed: 1, model.Shard);
            int[] ids = new int[fitting];
            var plan = new TrainingPlan
            {
                Samples = [TrainingSample.FromTokens(ids, Enumerable.Repeat(true, fitting).ToArray())],
                Epochs = 1 << 20,
                Optimizer = optimizer,
            };
            run = new TrainingRun(model, adapter, plan, program);
            model.Backend.ReserveScratch(engine.Memory.Scratch(trains: true));
            return run;
        }
        catch (Exception e)
        {
            run?.Dispose();
            Release(program);
            if (model.Backend.IsOutOfMemory(e)) // The machine has less than its budget says: a profile is not worth a refusal.
            {
                return null;
            }

            throw;
        }
    }

    /// <summary>Gives back what a job holds.</summary>
    public void End(TrainingRun? run)
    {
        if (run is not null)
        {
            run.Dispose();
            Release(run.Program);
        }
    }

    private void Release(TrainingProgram program)
    {
        engine.Backward.Release(program);
        engine.Model.Backend.ReserveScratch(engine.Memory.Scratch(trains: false));
    }

    /// <summary>Rows of one sequence in a step, the last of which may be sampled.</summary>
    public readonly record struct Inference(int Start, int Rows, bool IsSampled);
}
