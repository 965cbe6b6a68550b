using System.Diagnostics.CodeAnalysis;
using System.Runtime.ExceptionServices;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Group;

/// <summary>
/// Where the ranks of a group meet. It ends in one of two ways: all have come, or the group has failed and everyone who waits or
/// comes later gets an exception with the cause. The first failure stays; there is no way back. It also knows who reads the memory of
/// others just now, because that memory must stay even when its owner fails.
/// </summary>
internal sealed class RankBarrier(int ranks)
{
    private readonly object _gate = new();
    private volatile Fault? _fault;
    private volatile int _round;
    private int _arrived;
    private int _gone;
    private int _reading;

    /// <summary>What the group failed of, if an exception was the cause.</summary>
    public ExceptionDispatchInfo? Cause => _fault?.Cause;

    /// <summary>Waits for the others.</summary>
    public void Meet(int rank)
    {
        int round;
        lock (_gate)
        {
            if (_gone > 0)
            {
                SetFault($"Rank {rank} waits for a rank that has already returned: the ranks do not make the same calls.", null);
            }

            ThrowIfFailed();
            round = _round;
            if (++_arrived == ranks)
            {
                _arrived = 0;
                _round = round + 1;
                Monitor.PulseAll(_gate);
                return;
            }
        }

        // The others are a few microseconds behind as a rule, less than it takes to wake a thread.
        SpinWait spin = default;
        while (_round == round && _fault is null && !spin.NextSpinWillYield)
        {
            spin.SpinOnce();
        }

        lock (_gate)
        {
            while (_round == round)
            {
                ThrowIfFailed();
                Monitor.Wait(_gate);
            }
        }
    }

    /// <summary>
    /// Memory of other ranks may be read until the result is disposed; not to be waited in. Throws if the group has failed: then the
    /// memory may be gone.
    /// </summary>
    public Reading StartReading()
    {
        lock (_gate)
        {
            ThrowIfFailed();
            _reading++;
            return new Reading(this);
        }
    }

    /// <summary>
    /// After a failure: returns when nobody reads the memory of others any more, and nobody will. Whoever leaves a call that failed
    /// may be about to free what others read.
    /// </summary>
    public void WaitForReaders()
    {
        lock (_gate)
        {
            Check.That(_fault is not null);
            while (_reading > 0)
            {
                Monitor.Wait(_gate);
            }
        }
    }

    /// <summary>All ranks are about to start.</summary>
    public void Open()
    {
        lock (_gate)
        {
            ThrowIfFailed();
            _gone = 0;
        }
    }

    /// <summary>This rank will not come again; whoever waits for it has waited in vain.</summary>
    public void Leave(int rank)
    {
        lock (_gate)
        {
            _gone++;
            if (_arrived > 0)
            {
                SetFault($"Rank {rank} has returned while others wait for it: the ranks do not make the same calls.", null);
            }
        }
    }

    /// <summary>A rank has thrown.</summary>
    public void Fail(int rank, Exception cause) => Fail($"Rank {rank} of {ranks} failed: {cause.Message}", cause);

    /// <summary>The group is of no use any more. Whoever came first has the word.</summary>
    public void Fail(string message, Exception? cause)
    {
        lock (_gate)
        {
            SetFault(message, cause);
        }
    }

    public void ThrowIfFailed()
    {
        if (_fault is { } fault)
        {
            Throw(fault);
        }
    }

    [DoesNotReturn]
    private static void Throw(Fault fault) => throw new FlexLlmException(fault.Message, fault.Cause?.SourceException);

    private void SetFault(string message, Exception? cause)
    {
        _fault ??= new Fault(message, cause is null ? null : ExceptionDispatchInfo.Capture(cause));
        Monitor.PulseAll(_gate);
    }

    private void EndReading()
    {
        lock (_gate)
        {
            _reading--;
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>A rank reads what others have posted.</summary>
    public readonly ref struct Reading(RankBarrier barrier)
    {
        public void Dispose() => barrier.EndReading();
    }

    private sealed record Fault(string Message, ExceptionDispatchInfo? Cause);
}
