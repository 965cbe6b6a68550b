using System.Runtime.CompilerServices;
using System.Threading.Channels;
using FlexLLM.Engine;
using FlexLLM.Scheduling;

namespace FlexLLM;

/// <summary>A running finetuning job: its progress and its controls. Safe to use from any thread.</summary>
public sealed class FinetuningJob
{
    // A reader that falls behind loses the oldest reports, never the newest.
    private const int ReportsHeld = 256;

    private readonly EngineInbox _inbox;
    private readonly Lock _gate = new();
    private readonly List<Channel<FinetuningProgress>> _readers = [];
    private readonly TaskCompletionSource<FinetuningProgress> _completion = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private FinetuningProgress _latest;

    internal FinetuningJob(EngineInbox inbox, JobId id, string adapter, int samples, int skippedSamples, FinetuningProgress initial)
    {
        _inbox = inbox;
        Id = id;
        Adapter = adapter;
        Samples = samples;
        SkippedSamples = skippedSamples;
        _latest = initial;
    }

    /// <summary>Name under which its versions are published.</summary>
    public string Adapter { get; }

    /// <summary>Samples that the job trains on.</summary>
    public int Samples { get; }

    /// <summary>Samples left out because they were empty, too long or without a target.</summary>
    public int SkippedSamples { get; }

    /// <summary>The newest report.</summary>
    public FinetuningProgress Latest
    {
        get
        {
            lock (_gate)
            {
                return _latest;
            }
        }
    }

    /// <summary>Ends with the last report; faults when the job failed, is cancelled when the job was.</summary>
    public Task<FinetuningProgress> Completion => _completion.Task;

    internal JobId Id { get; }

    /// <summary>Reports from now on, the newest one first; ends when the job does.</summary>
    public async IAsyncEnumerable<FinetuningProgress> Progress([EnumeratorCancellation] CancellationToken cancellationToken = default)
    {
        Channel<FinetuningProgress> reports = Channel.CreateBounded<FinetuningProgress>(
            new BoundedChannelOptions(ReportsHeld) { FullMode = BoundedChannelFullMode.DropOldest, SingleReader = true });
        lock (_gate)
        {
            reports.Writer.TryWrite(_latest);
            if (_completion.Task.IsCompleted)
            {
                reports.Writer.Complete();
            }
            else
            {
                _readers.Add(reports);
            }
        }

        try
        {
            await foreach (FinetuningProgress report in reports.Reader.ReadAllAsync(cancellationToken).ConfigureAwait(false))
            {
                yield return report;
            }
        }
        finally
        {
            lock (_gate)
            {
                _readers.Remove(reports);
            }
        }
    }

    /// <summary>
    /// Stops after the work in progress. In the forward phase of a sample the memory of its activations goes back to the KV cache;
    /// that sample's forward phase starts over on resume. In the backward phase, whose work could not be done again without it, the
    /// job keeps it. Either way the finished job has the bits of one that was never paused (on the CPU backend).
    /// </summary>
    public Task PauseAsync(CancellationToken cancellationToken = default) =>
        _inbox.CallAsync(loop => loop.Jobs.Pause(Id), cancellationToken);

    /// <summary>Goes on where <see cref="PauseAsync"/> stopped, and takes again the memory that it gave back.</summary>
    /// <exception cref="RequestRejectedException">That memory is not to be had now; the job stays paused.</exception>
    public Task ResumeAsync(CancellationToken cancellationToken = default) =>
        _inbox.CallAsync(loop => loop.Jobs.Resume(Id), cancellationToken);

    /// <summary>Ends the job and frees what it holds. Versions that were published stay.</summary>
    public Task CancelAsync(CancellationToken cancellationToken = default) =>
        _inbox.CallAsync(loop => loop.Jobs.Cancel(Id), cancellationToken);

    /// <summary>Publishes the weights of the last optimizer step as the adapter's newest version now.</summary>
    public Task PublishAsync(CancellationToken cancellationToken = default) =>
        _inbox.CallAsync(loop => loop.Jobs.PublishNow(Id), cancellationToken);

    /// <summary>
    /// Writes weights, optimizer state and position as of the last optimizer step. A job started with the same request and
    /// <see cref="FinetuningRequest.ResumeFrom"/> ends with the bits of an uninterrupted one (on the CPU backend).
    /// </summary>
    /// <returns>The number of optimizer steps in the checkpoint.</returns>
    public async Task<int> SaveCheckpointAsync(string folder, CancellationToken cancellationToken = default)
    {
        ArgumentException.ThrowIfNullOrEmpty(folder);
        Finetuning.JobCheckpoint checkpoint = await _inbox.CallAsync(loop => loop.Jobs.Capture(Id), cancellationToken)
            .ConfigureAwait(false);
        await Task.Run(() => checkpoint.Save(folder), cancellationToken).ConfigureAwait(false);
        return checkpoint.Steps;
    }

    internal void Report(FinetuningProgress progress)
    {
        lock (_gate)
        {
            _latest = progress;
            foreach (Channel<FinetuningProgress> reader in _readers)
            {
                reader.Writer.TryWrite(progress);
            }
        }
    }

    /// <summary>The last report; error is the cause of a failure.</summary>
    internal void End(FinetuningProgress progress, Exception? error)
    {
        Report(progress);
        lock (_gate)
        {
            if (error is not null)
            {
                _completion.TrySetException(error);
                _ = _completion.Task.Exception; // A failed job that nobody awaits is not an unobserved exception.
            }
            else if (progress.Status == FinetuningStatus.Cancelled)
            {
                _completion.TrySetCanceled();
            }
            else
            {
                _completion.TrySetResult(progress);
            }

            foreach (Channel<FinetuningProgress> reader in _readers)
            {
                reader.Writer.TryComplete();
            }
        }
    }
}
