using System.Collections.Immutable;
using System.Runtime.ExceptionServices;
using FlexLLM.Adapters;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Scheduling;
using Microsoft.Extensions.Logging;

namespace FlexLLM.Engine;

/// <summary>The finetuning jobs of an engine: their order, their work in a step, their ends. Loop thread only.</summary>
internal sealed partial class JobTable(
    LoadedModel model, AdapterStore adapters, BackwardPass backward, MemoryPlan memory, DeviceBudget budget, CoServingOptions options,
    ILogger logger) : IDisposable
{
    // Steps of a job's largest work that it may be ahead of another by; one alone is what taking turns comes to.
    private const double LeadStepsMax = 2.0;

    private readonly SortedDictionary<long, JobEntry> _jobs = [];
    private long _nextId = 1;

    /// <summary>True when a job could work in the next step.</summary>
    public bool HasWork => _jobs.Values.Any(j => !j.Paused);

    /// <summary>Tokens that went through a forward pass of any job, each counted once a pass.</summary>
    public long TokensTrained { get; private set; }

    /// <summary>Device bytes of all jobs, adapters that they published not counted.</summary>
    public long Bytes => _jobs.Values.Sum(j => j.Run.Memory().Bytes + backward.Memory(j.Run.Program).Bytes);

    private bool HasArenas => _jobs.Values.Any(j => j.Run.HasArenas);

    /// <summary>Starts a job on samples that were tokenised before. What it needs is made free, or the job is refused.</summary>
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

        string parameters = JobEntry.ParametersOf(request, samples);
        TrainingRun run = Allocate(request, samples);
        try
        {
            if (request.ResumeFrom is string folder)
            {
                JobCheckpoint.Restore(folder, run, model.Backend, parameters);
            }

            // A name that is served already keeps its version until this job has a better one.
            if (!adapters.Contains(request.Adapter) && run.Cursor.Phase != TrainingPhase.Done)
            {
                Publish(request.Adapter, run, CopyOf(run));
            }
        }
        catch
        {
            Free(run);
            throw;
        }

        var id = new JobId(_nextId++);
        var entry = new JobEntry(request, run, now, parameters) { Served = LeastServed(JobEntry.WeightOf(request)) };
        var job = new FinetuningJob(
            inbox, id, request.Adapter, samples.Samples.Count, samples.Skipped, entry.ProgressAt(FinetuningStatus.Running, now));
        entry.Handle = job;
        _jobs.Add(id.Value, entry);
        StartAhead(entry);
        FitScratch(); // Its first version came after what was reserved.
        logger.LogInformation(
            "Finetuning of '{Adapter}' started: {Samples} samples, {Steps} steps.", request.Adapter, job.Samples, run.Cursor.Steps);
        if (run.Cursor.Phase == TrainingPhase.Done)
        {
            CompleteOrFail(id.Value, entry, now);
        }

        return job;
    }

    public ImmutableArray<JobSnapshot> Snapshot()
    {
        var snapshots = ImmutableArray.CreateBuilder<JobSnapshot>(_jobs.Count);
        foreach ((long id, JobEntry entry) in _jobs)
        {
            TrainingCursor cursor = entry.Run.Cursor;
            bool forward = cursor.Phase == TrainingPhase.Forward;
            snapshots.Add(new JobSnapshot
            {
                Id = new JobId(id),
                Weight = entry.Weight,
                Phase = entry.Paused ? JobPhase.Blocked : forward ? JobPhase.Forward : JobPhase.Backward,
                ServedTokens = (long)entry.Served,
                SampleTokens = cursor.Sample.Ids.Length,
                PositionsDone = cursor.PositionsDone,
                AheadTokens = entry.Run.RunsAhead ? cursor.Ahead?.Ids.Length ?? 0 : 0,
                AheadDone = cursor.AheadDone,
                Layer = cursor.Layer,
                LowestLayer = cursor.LowestLayer,
                LayersAbove = model.Config.LayerCount - 1 - cursor.LowestLayer,
                RowsLeft = cursor.RowsLeft,
            });
        }

        return snapshots.MoveToImmutable();
    }

    public void AddWindow(ForwardWindow window, TokenBatch batch) => _jobs[window.Id.Value].Run.AddForwardWindow(batch, window.Tokens);

    public void CompleteWindow(ForwardWindow window)
    {
        JobEntry entry = _jobs[window.Id.Value];
        entry.Run.CompleteForward(window.Tokens);
        Serve(entry, window.Tokens);
        TokensTrained += window.Tokens;
    }

    /// <summary>Gives back the room for second samples. False where no job had any.</summary>
    public bool StopAhead()
    {
        bool had = false;
        foreach (JobEntry entry in _jobs.Values.Where(j => j.Run.RunsAhead))
        {
            TokensTrained -= entry.Run.StopAhead();
            had = true;
        }

        return had;
    }

    /// <summary>Stops a job after the work in progress; what can be made again is given back to the device.</summary>
    public bool Pause(JobId id)
    {
        JobEntry entry = Find(id);
        TokensTrained -= entry.Run.StopAhead();
        if (entry.Run.Park() is int tokens)
        {
            TokensTrained -= tokens;
            backward.Release(entry.Run.Program);
            FitScratch();
        }

        entry.Paused = true;
        entry.Handle!.Report(entry.Handle.Latest with { Status = FinetuningStatus.Paused });
        return true;
    }

    /// <summary>Lets a paused job go on. Where its memory cannot be had, it is refused and stays paused.</summary>
    public bool Resume(JobId id)
    {
        JobEntry entry = Find(id);
        if (!entry.Paused)
        {
            return true;
        }

        if (!entry.Run.HasArenas)
        {
            TrainingRun run = entry.Run;
            MemoryTable job = memory.OfJob(run.Program, run.Adapter.Config, entry.Request.Optimizer.Moments, run.TokensMax);
            MemoryTable needs = new([.. job.Rows.Where(r => MemoryUse.Arenas.Contains(r.Use)), .. ScratchForTraining()]);
            budget.Require(needs.Bytes, $"What the job on '{entry.Request.Adapter}' gave back when it was paused", needs, _ =>
                "It stays paused; end other jobs or unload adapters, and resume it then.");
            try
            {
                backward.Reserve(run.Program);
                run.Unpark();
                model.Backend.ReserveScratch(memory.Scratch(trains: true));
            }
            catch
            {
                _ = run.Park();
                backward.Release(run.Program);
                FitScratch();
                throw;
            }
        }

        // What it missed while it slept is not owed to it: it would shut the others out until it had caught up.
        entry.Served = Math.Max(entry.Served, LeastServed(entry.Weight));
        entry.Paused = false;
        StartAhead(entry);
        entry.Handle!.Report(entry.Handle.Latest with { Status = FinetuningStatus.Running });
        return true;
    }

    /// <summary>Ends a job; one that has ended already is left as it is.</summary>
    public bool Cancel(JobId id)
    {
        if (_jobs.TryGetValue(id.Value, out JobEntry? entry))
        {
            End(id.Value, entry, FinetuningStatus.Cancelled, entry.Started, error: null);
        }

        return true;
    }

    public bool PublishNow(JobId id)
    {
        JobEntry entry = Find(id);
        string name = entry.Request.Adapter;
        MemoryTable needs = memory.OfAdapter(entry.Run.Adapter.Config);
        budget.Require(needs.Bytes, $"A version of '{name}' beside the job's own weights", needs, _ =>
            "It is published when the job ends, without a copy; unload adapters to publish it now.");
        Publish(name, entry.Run, CopyOf(entry.Run));
        return true;
    }

    /// <summary>A checkpoint of the last step, on the host.</summary>
    public JobCheckpoint Capture(JobId id)
    {
        JobEntry entry = Find(id);
        return JobCheckpoint.Capture(entry.Run, model.Backend, entry.Parameters);
    }

    /// <summary>Ends every job: with the cause of a fault, or as cancelled.</summary>
    public void EndAll(Exception? cause)
    {
        Exception? first = null;
        foreach ((long id, JobEntry entry) in _jobs.ToArray())
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

    private JobEntry Find(JobId id) => _jobs.TryGetValue(id.Value, out JobEntry? entry)
        ? entry
        : throw new RequestRejectedException("The finetuning job has ended.");

    // Refused before anything is allocated: a machine that runs out of memory would take every request down with the job.
    private TrainingRun Allocate(FinetuningRequest request, BuiltSamples samples)
    {
        PeftConfig method = ConfigOf(request);
        int tokensMax = samples.Samples.Max(s => s.Ids.Length);

        // What stays F32 beside narrower activations: at most the log-sum-exp of every layer.
        long elementBytes = memory.ActivationBytes(1, 1);
        long exactBytes = model.Backend.TensorBytes(1, 1);
        long sumsBytes = (exactBytes - elementBytes) * model.Config.LayerCount * model.Config.AttentionHeads;
        TrainingProgram program = model.CompileTraining(PeftAdapter.NetworksOf(method, model.Whole), new CompilerOptions
        {
            Rematerialization = new RematerializationOptions
            {
                SavedColumnsMax = ((request.SavedBytesMax / tokensMax) - sumsBytes) / elementBytes,
                SequenceTokens = tokensMax,
            },
            StoresSavedAsBF16 = request.SavesAsBF16 && elementBytes == exactBytes,
        });
        long savedBytes = program.Saved.Sum(s => memory.SavedBytes(s, tokensMax));
        if (savedBytes > (request.SavedBytesMax ?? long.MaxValue))
        {
            throw new RequestRejectedException(
                $"FinetuningRequest.SavedBytesMax is {request.SavedBytesMax}; the longest sample has {tokensMax} tokens, which need at " +
                $"least {savedBytes} bytes with all computed again that can be.");
        }

        budget.Require(NeedsAt(tokensMax).Bytes, $"The job on '{request.Adapter}'", NeedsAt(tokensMax), attainable =>
        {
            int fitting = Bisection.Largest(tokensMax, n => NeedsAt(n).Bytes <= attainable);
            string samplesThatFit = fitting < 2 ? string.Empty
                : $"Samples of at most {fitting} tokens (SampleTokensMax; the longest has {tokensMax}) would fit. ";
            return samplesThatFit + "Fewer target modules or a smaller rank need less.";
        });
        TrainingRun? run = null;
        try
        {
            backward.Reserve(program);
            run = new TrainingRun(model, CreateMaster(request, method), PlanOf(request, samples), program);
            model.Backend.ReserveScratch(memory.Scratch(trains: true));
            return run;
        }
        catch
        {
            run?.Dispose();
            backward.Release(program);
            FitScratch();
            throw;
        }

        // Where the name is new, its first version is a copy beside the job's own weights.
        MemoryTable NeedsAt(int tokens) => new(
        [
            .. memory.OfJob(program, method, request.Optimizer.Moments, tokens).Rows,
            .. adapters.Contains(request.Adapter) ? [] : memory.OfAdapter(method).Rows.Select(r => r with { Item = "first version" }),
            .. ScratchForTraining(),
        ]);
    }

    // What scratch memory grows by when there was no job in work.
    private MemoryRow[] ScratchForTraining() => HasArenas ? []
        : [new(MemoryUse.Scratch, "finetuning", 1, memory.ScratchBytes(trains: true) - memory.ScratchBytes(trains: false))];

    private void FitScratch() => model.Backend.ReserveScratch(memory.Scratch(trains: HasArenas));

    private void Free(TrainingRun run)
    {
        backward.Release(run.Program);
        run.Dispose();
        FitScratch();
    }

    // Two samples of a job in flight, where memory is left over: the slack of a step can then always take forward tokens, which share
    // the reading of the weights with the requests.
    private void StartAhead(JobEntry entry)
    {
        TrainingRun run = entry.Run;
        if (entry.Request.GradientAccumulation > 1 && run is { RunsAhead: false, Cursor.Phase: not TrainingPhase.Done } &&
            options.Sharing.Mode == SharingMode.CoServing && budget.HasSpare(memory.OfSample(run.Program, run.TokensMax).Bytes))
        {
            try
            {
                run.StartAhead();
                FitScratch();
            }
            catch (OutOfMemoryException)
            {
                logger.LogWarning("No room for a second sample of the job on '{Adapter}'.", entry.Request.Adapter);
            }
        }
    }

    // A resumed adapter's shape, else an existing one's, else a new one's. It must be what the request asks for, where it does.
    private PeftConfig ConfigOf(FinetuningRequest request)
    {
        if (request.ResumeFrom is string folder)
        {
            PeftConfig resumed = PeftFolder.ReadConfig(folder, model.Whole);
            return Fits(request.Method, resumed) ? resumed : throw new RequestRejectedException(
                $"The checkpoint in {folder} holds an adapter of {resumed.Describe()}; FinetuningRequest.Method asks for another.");
        }

        if (!adapters.Contains(request.Adapter))
        {
            return request.Method ?? new LoraConfig();
        }

        PeftConfig existing = adapters.Get(request.Adapter).Weights.Config;
        return Fits(request.Method, existing) ? existing : throw new RequestRejectedException(
            $"Adapter '{request.Adapter}' exists with {existing.Describe()}; leave FinetuningRequest.Method null to train it further, " +
            "or choose another name.");
    }

    private PeftAdapter CreateMaster(FinetuningRequest request, PeftConfig method) =>
        request.ResumeFrom is string folder ? PeftFolder.Load(folder, model)
        : adapters.Contains(request.Adapter) ? adapters.Get(request.Adapter).Weights.Copy(model.Backend)
        : PeftAdapter.CreateRandom(model.Backend, model.Whole, method, request.InitializationSeed, model.Shard);

    private static TrainingPlan PlanOf(FinetuningRequest request, BuiltSamples samples) => new()
    {
        Samples = samples.Samples,
        Epochs = request.Epochs,
        GradientAccumulation = request.GradientAccumulation,
        ShuffleSeed = request.ShuffleSeed,
        Optimizer = request.Optimizer,
    };

    private bool Fits(PeftConfig? wanted, PeftConfig config) => wanted is null || (wanted.Scale == config.Scale &&
        PeftAdapter.NetworksOf(wanted, model.Whole).ToHashSet().SetEquals(PeftAdapter.NetworksOf(config, model.Whole)));

    // A version that finds no room now is left out: the next one, at the latest the last, takes its place.
    private void PublishIfFits(JobEntry entry)
    {
        TrainingRun run = entry.Run;
        if (budget.TryFree(memory.OfAdapter(run.Adapter.Config).Bytes))
        {
            Publish(entry.Request.Adapter, run, CopyOf(run));
            return;
        }

        logger.LogWarning(
            "No room for a version of adapter '{Adapter}' at step {Step}: it is not published.", entry.Request.Adapter, run.Cursor.Step);
    }

    private Func<PeftAdapter> CopyOf(TrainingRun run) => () => run.Adapter.Copy(model.Backend);

    // The weights are the run's own or a copy of them; they are asked for once they are known to be good.
    private void Publish(string name, TrainingRun run, Func<PeftAdapter> weights)
    {
        if (!run.Adapter.IsFinite(model.Backend))
        {
            throw new FlexLlmException(
                $"The weights of '{name}' are not finite after step {run.Cursor.Step}: the learning rate is too high, " +
                "or the data overflow the model.");
        }

        AdapterVersion version = adapters.Publish(name, weights());
        logger.LogInformation("Adapter '{Adapter}' version {Version} is live (step {Step}).", name, version.Number, run.Cursor.Step);
    }

    // The job's own weights become the last version: nothing is copied, so nothing can be missing for it.
    private void CompleteOrFail(long id, JobEntry entry, TimeSpan now)
    {
        try
        {
            Publish(entry.Request.Adapter, entry.Run, entry.Run.Detach);
        }
        catch (FlexLlmException e)
        {
            // Weights that are no numbers, or as many adapters as there may be.
            End(id, entry, FinetuningStatus.Failed, now, e);
            return;
        }

        End(id, entry, FinetuningStatus.Completed, now, error: null);
    }

    private void End(long id, JobEntry entry, FinetuningStatus status, TimeSpan now, Exception? error)
    {
        _jobs.Remove(id);
        FinetuningProgress last = now > entry.Started ? entry.ProgressAt(status, now) : entry.Handle!.Latest with { Status = status };
        try
        {
            Free(entry.Run);
        }
        finally
        {
            entry.Handle!.End(last, error);
        }

        logger.LogInformation("Finetuning of '{Adapter}' ended: {Status}.", entry.Request.Adapter, status);
    }

    // A job cannot always use its share: a sample goes forward and backward in turns, and others take what is left. That is not owed to
    // it for ever, or all of them would stand still for as long as there was time for everybody, once there is less.
    private void Serve(JobEntry entry, double tokens)
    {
        entry.Served += tokens;
        double lead = LeadStepsMax * (options.TokensPerStepMax + entry.Run.TokensMax);
        double least = (entry.Served - lead) / entry.Weight;
        foreach (JobEntry other in _jobs.Values)
        {
            other.Served = Math.Max(other.Served, least * other.Weight);
        }
    }

    // The least work per weight that a job in progress had, as work of a job of this weight.
    private double LeastServed(double weight) =>
        _jobs.Values.Where(j => !j.Paused).Select(j => j.Served / j.Weight).DefaultIfEmpty(0).Min() * weight;
}
