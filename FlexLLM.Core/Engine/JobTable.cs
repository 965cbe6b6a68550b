using System.Collections.Immutable;
using System.Globalization;
using System.Runtime.ExceptionServices;
using FlexLLM.Adapters;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;
using Microsoft.Extensions.Logging;

namespace FlexLLM.Engine;

/// <summary>The finetuning jobs of an engine: their order, their work in a step, their ends. Loop thread only.</summary>
internal sealed class JobTable(LoadedModel model, AdapterStore adapters, BackwardPass backward, CoServingOptions options, ILogger logger)
    : IDisposable
{
    private readonly SortedDictionary<long, Entry> _jobs = [];
    private long _nextId = 1;

    /// <summary>True when a job could work in the next step.</summary>
    public bool HasWork => _jobs.Values.Any(j => !j.Paused);

    /// <summary>Tokens that went through a forward pass of any job, each counted once a pass.</summary>
    public long TokensTrained { get; private set; }

    /// <summary>Starts a job on samples that were tokenised before.</summary>
    public FinetuningJob Start(EngineInbox inbox, FinetuningRequest request, BuiltSamples samples, TimeSpan now)
    {
        if (_jobs.Count >= options.JobsMax)
        {
            throw new RequestRejectedException(
                $"{options.JobsMax} finetuning jobs are running (JobsMax); wait for one to end or cancel it.");
        }

        if (_jobs.Values.Any(j => j.Request.Adapter == request.Adapter))
        {
            throw new RequestRejectedException($"Adapter '{request.Adapter}' is being trained already.");
        }

        if ((long)samples.Samples.Count * request.Epochs > int.MaxValue)
        {
            throw new RequestRejectedException(
                $"{samples.Samples.Count} samples in {request.Epochs} epochs are more than {int.MaxValue} in all.");
        }

        string parameters = Parameters(request, samples);
        PeftAdapter master = CreateMaster(request);
        TrainingRun run;
        try
        {
            TrainingProgram program = model.CompileTraining(master.Networks);
            CheckFits(request, master, program, samples);
            var plan = new TrainingPlan
            {
                Samples = samples.Samples,
                Epochs = request.Epochs,
                GradientAccumulation = request.GradientAccumulation,
                ShuffleSeed = request.ShuffleSeed,
                Optimizer = request.Optimizer,
            };
            run = new TrainingRun(model, master, plan, program);
        }
        catch
        {
            master.Dispose();
            throw;
        }

        try
        {
            if (request.ResumeFrom is string folder)
            {
                JobCheckpoint.Restore(folder, run, model.Backend, parameters);
            }

            // A name that is served already keeps its version until this job has a better one.
            if (!adapters.Contains(request.Adapter) || run.Cursor.Phase == TrainingPhase.Done)
            {
                Publish(request.Adapter, run);
            }
        }
        catch
        {
            run.Dispose();
            throw;
        }

        var id = new JobId(_nextId++);
        var entry = new Entry(request, run, now, parameters) { Served = LeastServed(request.Weight) };
        var job = new FinetuningJob(
            inbox, id, request.Adapter, samples.Samples.Count, samples.Skipped, ProgressOf(entry, FinetuningStatus.Running, now));
        entry.Handle = job;
        _jobs.Add(id.Value, entry);
        logger.LogInformation(
            "Finetuning of '{Adapter}' started: {Samples} samples, {Steps} steps.", request.Adapter, job.Samples, run.Cursor.Steps);
        if (run.Cursor.Phase == TrainingPhase.Done)
        {
            End(id.Value, entry, FinetuningStatus.Completed, now, error: null);
        }

        return job;
    }

    public ImmutableArray<JobSnapshot> Snapshot()
    {
        var snapshots = ImmutableArray.CreateBuilder<JobSnapshot>(_jobs.Count);
        foreach ((long id, Entry entry) in _jobs)
        {
            TrainingCursor cursor = entry.Run.Cursor;
            bool forward = cursor.Phase == TrainingPhase.Forward;
            snapshots.Add(new JobSnapshot
            {
                Id = new JobId(id),
                Weight = entry.Request.Weight,
                Phase = entry.Paused ? JobPhase.Blocked : forward ? JobPhase.Forward : JobPhase.Backward,
                ServedTokens = (long)entry.Served,
                SampleTokens = cursor.Sample.Ids.Length,
                PositionsDone = cursor.PositionsDone,
                Layer = cursor.Layer,
                LowestLayer = cursor.LowestLayer,
                RowsLeft = cursor.RowsLeft,
            });
        }

        return snapshots.MoveToImmutable();
    }

    public void AddWindow(ForwardWindow window, TokenBatch batch) => _jobs[window.Id.Value].Run.AddForwardWindow(batch, window.Tokens);

    public void CompleteWindow(ForwardWindow window)
    {
        Entry entry = _jobs[window.Id.Value];
        entry.Run.CompleteForward(window.Tokens);
        entry.Served += window.Tokens;
        TokensTrained += window.Tokens;
    }

    /// <summary>Runs one backward item, and the optimizer where it completes a group.</summary>
    public void RunBackward(BackwardWindow window, TimeSpan now)
    {
        Entry entry = _jobs[window.Id.Value];
        TrainingRun run = entry.Run;
        Check.That(run.Cursor.Layer == window.Layer && run.Cursor.RowsLeft == window.RowStart + window.RowCount);

        // A layer of a window weighs its share of the sample's forward pass, so that both halves count alike between jobs.
        entry.Served += (double)window.RowCount / model.Config.LayerCount;
        if (!run.RunBackward(backward, window.RowCount))
        {
            return;
        }

        run.Step();
        if (!double.IsFinite(run.LastLoss))
        {
            End(window.Id.Value, entry, FinetuningStatus.Failed, now, new FlexLlmException(
                $"The loss of step {run.Cursor.Step} is {run.LastLoss}: the learning rate is too high, or the data overflow the model."));
            return;
        }

        try
        {
            if (run.Cursor.Phase == TrainingPhase.Done)
            {
                Complete(window.Id.Value, entry, now);
                return;
            }

            if (entry.Request.PublishEverySteps is int every && run.Cursor.Step % every == 0)
            {
                Publish(entry.Request.Adapter, run);
            }
        }
        catch (Exception e) when (e is FlexLlmException or OutOfMemoryException)
        {
            // Weights that are no numbers, or no room for another version: the job's own bad luck, nobody else's.
            End(window.Id.Value, entry, FinetuningStatus.Failed, now, e);
            return;
        }

        entry.Handle!.Report(ProgressOf(entry, FinetuningStatus.Running, now));
    }

    public bool SetPaused(JobId id, bool paused)
    {
        Entry entry = Find(id);
        if (entry.Paused && !paused)
        {
            // What it missed while it slept is not owed to it: it would shut the others out until it had caught up.
            entry.Served = Math.Max(entry.Served, LeastServed(entry.Request.Weight));
        }

        entry.Paused = paused;
        entry.Handle!.Report(entry.Handle.Latest with { Status = paused ? FinetuningStatus.Paused : FinetuningStatus.Running });
        return true;
    }

    /// <summary>Ends a job; one that has ended already is left as it is.</summary>
    public bool Cancel(JobId id)
    {
        if (_jobs.TryGetValue(id.Value, out Entry? entry))
        {
            End(id.Value, entry, FinetuningStatus.Cancelled, entry.Started, error: null);
        }

        return true;
    }

    public bool PublishNow(JobId id)
    {
        Entry entry = Find(id);
        Publish(entry.Request.Adapter, entry.Run);
        return true;
    }

    /// <summary>A checkpoint of the last step, on the host.</summary>
    public JobCheckpoint Capture(JobId id)
    {
        Entry entry = Find(id);
        return JobCheckpoint.Capture(entry.Run, model.Backend, entry.Parameters);
    }

    /// <summary>Ends every job: with the cause of a fault, or as cancelled.</summary>
    public void EndAll(Exception? cause)
    {
        Exception? first = null;
        foreach ((long id, Entry entry) in _jobs.ToArray())
        {
            try
            {
                End(id, entry, cause is null ? FinetuningStatus.Cancelled : FinetuningStatus.Failed, entry.Started, cause);
            }
#pragma warning disable CA1031 // One job that cannot be freed in order must not leave the others' waiters behind.
            catch (Exception e)
#pragma warning restore CA1031
            {
                first ??= e;
            }
        }

        if (first is not null)
        {
            ExceptionDispatchInfo.Throw(first);
        }
    }

    /// <summary>Refuses to touch a name that a job publishes under.</summary>
    public void RequireNotTrained(string name)
    {
        if (_jobs.Values.Any(j => j.Request.Adapter == name))
        {
            throw new RequestRejectedException($"Adapter '{name}' is being trained; wait for its job to end or cancel it.");
        }
    }

    public void Dispose() => EndAll(cause: null);

    private Entry Find(JobId id) => _jobs.TryGetValue(id.Value, out Entry? entry)
        ? entry
        : throw new RequestRejectedException("The finetuning job has ended.");

    // Resumed weights, else an existing adapter's, else fresh ones.
    private PeftAdapter CreateMaster(FinetuningRequest request)
    {
        if (request.ResumeFrom is string folder)
        {
            PeftAdapter resumed = PeftFolder.Load(folder, model);
            if (Fits(request.Method, resumed))
            {
                return resumed;
            }

            string shape = ShapeOf(resumed);
            resumed.Dispose();
            throw new RequestRejectedException(
                $"The checkpoint in {folder} holds an adapter of {shape}; FinetuningRequest.Method asks for another.");
        }

        if (!adapters.Contains(request.Adapter))
        {
            PeftConfig method = request.Method ?? new LoraConfig();
            return PeftAdapter.CreateRandom(model.Backend, model.Config, method, request.InitializationSeed);
        }

        PeftAdapter existing = adapters.Get(request.Adapter).Weights;
        if (!Fits(request.Method, existing))
        {
            throw new RequestRejectedException(
                $"Adapter '{request.Adapter}' exists with {ShapeOf(existing)}; leave FinetuningRequest.Method null to train it further, " +
                "or choose another name.");
        }

        return existing.Copy(model.Backend, model.Config);
    }

    // Refused before anything is allocated: a machine that runs out of memory would take every request down with the job.
    private void CheckFits(FinetuningRequest request, PeftAdapter master, TrainingProgram program, BuiltSamples samples)
    {
        int tokensMax = samples.Samples.Max(s => s.Ids.Length);
        TrainingMemory needs = TrainingMemory.Of(
            model, program, master, request.Optimizer.Moments, tokensMax, options.TokensPerStepMax);
        long left = options.DeviceBytesLimit - model.Backend.AllocatedBytes;
        if (needs.JobBytes > left)
        {
            throw new RequestRejectedException(string.Create(
                CultureInfo.InvariantCulture,
                $"The job on '{request.Adapter}' does not fit: {left / 1048576.0:F1} MiB are left of CoServingOptions.DeviceBytesMax. " +
                $"It needs{needs}\nShorter samples (SampleTokensMax; the longest has {tokensMax} tokens), " +
                $"fewer target modules or a smaller rank need less."));
        }
    }

    private bool Fits(PeftConfig? wanted, PeftAdapter adapter) => wanted is null || (wanted.Scale == adapter.Scale &&
        PeftAdapter.NetworksOf(wanted, model.Config).ToHashSet().SetEquals(adapter.Networks));

    private static string ShapeOf(PeftAdapter adapter) => adapter.Config.Describe();

    private void Publish(string name, TrainingRun run)
    {
        if (!run.Adapter.IsFinite(model.Backend))
        {
            throw new FlexLlmException(
                $"The weights of '{name}' are not finite after step {run.Cursor.Step}: the learning rate is too high, " +
                "or the data overflow the model.");
        }

        AdapterVersion version = adapters.Publish(name, run.Adapter.Copy(model.Backend, model.Config));
        logger.LogInformation("Adapter '{Adapter}' version {Version} is live (step {Step}).", name, version.Number, run.Cursor.Step);
    }

    private void Complete(long id, Entry entry, TimeSpan now)
    {
        Publish(entry.Request.Adapter, entry.Run);
        End(id, entry, FinetuningStatus.Completed, now, error: null);
    }

    private void End(long id, Entry entry, FinetuningStatus status, TimeSpan now, Exception? error)
    {
        _jobs.Remove(id);
        FinetuningProgress last = now > entry.Started ? ProgressOf(entry, status, now) : entry.Handle!.Latest with { Status = status };
        try
        {
            backward.Release(entry.Run.Program);
            entry.Run.Dispose();
        }
        finally
        {
            entry.Handle!.End(last, error);
        }

        logger.LogInformation("Finetuning of '{Adapter}' ended: {Status}.", entry.Request.Adapter, status);
    }

    // The least work per weight that a job in progress had, as work of a job of this weight.
    private double LeastServed(double weight) =>
        _jobs.Values.Where(j => !j.Paused).Select(j => j.Served / j.Request.Weight).DefaultIfEmpty(0).Min() * weight;

    private static FinetuningProgress ProgressOf(Entry entry, FinetuningStatus status, TimeSpan now)
    {
        TrainingRun run = entry.Run;
        double seconds = (now - entry.Started).TotalSeconds;
        double speed = seconds > 0 ? run.TokensDone / seconds : 0;
        long done = entry.TokensBefore + run.TokensDone;
        TimeSpan? remaining = speed > 0 ? TimeSpan.FromSeconds(Math.Max(0, run.Cursor.TokensTotal - done) / speed) : null;
        return new FinetuningProgress(
            status, run.Cursor.Step, run.Cursor.Steps, run.Cursor.EpochOfLastStep, run.LastLoss, done, speed, remaining);
    }

    // What must be equal for a resumed job to end with the same bits: the tokens and targets in their order, and how they are used.
    private static string Parameters(FinetuningRequest request, BuiltSamples samples)
    {
        var hash = new StableHash();
        foreach (TrainingSample sample in samples.Samples)
        {
            hash.Add(sample.Ids);
            hash.Add(sample.Targets);
        }

        return string.Create(
            CultureInfo.InvariantCulture,
            $"samples={samples.Samples.Count} data={hash.Value:x16} epochs={request.Epochs} accumulation={request.GradientAccumulation} " +
            $"shuffle={request.ShuffleSeed} {request.Optimizer.Describe()}");
    }

    /// <summary>One job.</summary>
    private sealed class Entry(FinetuningRequest request, TrainingRun run, TimeSpan started, string parameters)
    {
        public FinetuningRequest Request { get; } = request;

        public TrainingRun Run { get; } = run;

        public TimeSpan Started { get; } = started;

        /// <summary>What a checkpoint must share with the request that resumes it.</summary>
        public string Parameters { get; } = parameters;

        /// <summary>Tokens that an earlier run, before a resume, had done.</summary>
        public long TokensBefore { get; } = run.Cursor.TokensTotal * run.Cursor.Step / Math.Max(1, run.Cursor.Steps);

        public FinetuningJob? Handle { get; set; }

        public bool Paused { get; set; }

        /// <summary>Tokens of work it had, or was taken to have had when it joined the others.</summary>
        public double Served { get; set; }
    }
}
