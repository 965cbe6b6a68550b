using System.Diagnostics.CodeAnalysis;
using System.Threading.Channels;

namespace FlexLLM.Engine;

/// <summary>Something that another thread wants of the loop thread.</summary>
internal abstract class Submission
{
    /// <summary>Whether somebody waits for an answer to a prompt, for whom work is given up.</summary>
    public virtual bool IsRequest => false;

    /// <summary>Runs on the loop thread between two steps. Errors of the caller go back to the caller.</summary>
    public abstract void Execute(EngineLoop loop);

    /// <summary>The engine will not execute this any more.</summary>
    public abstract void Fail(Exception cause);
}

/// <summary>A submission whose caller awaits a result.</summary>
internal sealed class Submission<T>(Func<EngineLoop, T> action, bool isRequest = false) : Submission
{
    private readonly TaskCompletionSource<T> _result = new(TaskCreationOptions.RunContinuationsAsynchronously);

    public override bool IsRequest => isRequest;

    public Task<T> Result => _result.Task;

    public override void Execute(EngineLoop loop)
    {
        try
        {
            _result.TrySetResult(action(loop));
        }
        catch (Exception e) when (e is FlexLlmException or ArgumentException or IOException or UnauthorizedAccessException)
        {
            // The caller's mistake or the caller's disk: it costs nobody else anything.
            _result.TrySetException(e);
        }
        catch (Exception e) when (loop.Model.Backend.IsOutOfMemory(e))
        {
            _result.TrySetException(new RequestRejectedException("The device has not enough memory for this: " + e.Message));
        }
        catch (Exception e)
        {
            _result.TrySetException(new EngineFaultedException("The engine stopped while it served this call.", e));
            throw;
        }
    }

    public override void Fail(Exception cause) => _result.TrySetException(cause);
}

/// <summary>The one door to the loop thread: bounded, many writers, one reader. A full inbox makes callers wait.</summary>
internal sealed class EngineInbox(int capacity)
{
    private readonly Channel<Submission> _channel = Channel.CreateBounded<Submission>(
        new BoundedChannelOptions(capacity) { SingleReader = true, FullMode = BoundedChannelFullMode.Wait });

    // Never more than one signal held: any number of wakes before a wait is one.
    private readonly Channel<bool> _wake = Channel.CreateBounded<bool>(
        new BoundedChannelOptions(1) { SingleReader = true, FullMode = BoundedChannelFullMode.DropWrite });

    private int _requests;

    /// <summary>Queues a submission. Throws the cause once the inbox is closed.</summary>
    public async ValueTask SubmitAsync(Submission item, CancellationToken cancellationToken)
    {
        try
        {
            await _channel.Writer.WriteAsync(item, cancellationToken).ConfigureAwait(false);
        }
        catch (ChannelClosedException e) when (e.InnerException is not null)
        {
            throw e.InnerException;
        }

        Interlocked.Add(ref _requests, item.IsRequest ? 1 : 0);
        Wake();
    }

    /// <summary>Runs an action on the loop thread between two steps.</summary>
    public async Task<T> CallAsync<T>(Func<EngineLoop, T> action, CancellationToken cancellationToken, bool isRequest = false)
    {
        var submission = new Submission<T>(action, isRequest);
        await SubmitAsync(submission, cancellationToken).ConfigureAwait(false);
        return await submission.Result.ConfigureAwait(false);
    }

    public bool HasItems => _channel.Reader.TryPeek(out _);

    /// <summary>Whether a request is among them. It may be seen a moment late.</summary>
    public bool HasRequests => Volatile.Read(ref _requests) > 0;

    public bool TryTake([NotNullWhen(true)] out Submission? item)
    {
        bool isTaken = _channel.Reader.TryRead(out item);
        Interlocked.Add(ref _requests, isTaken && item!.IsRequest ? -1 : 0);
        return isTaken;
    }

    /// <summary>Lets a waiting loop look around: a message came, a request was cancelled, the engine stops.</summary>
    public void Wake() => _wake.Writer.TryWrite(true);

    /// <summary>Blocks the loop thread until somebody wakes it.</summary>
    public void Wait()
    {
        _wake.Reader.ReadAsync().AsTask().GetAwaiter().GetResult();
    }

    /// <summary>No more messages: waiting and later callers get the cause.</summary>
    public void Close(Exception cause)
    {
        _channel.Writer.TryComplete(cause);
        while (TryTake(out Submission? item))
        {
            item.Fail(cause);
        }
    }
}
