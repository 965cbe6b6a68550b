using System.Runtime.ExceptionServices;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Group;

/// <summary>
/// A thread for each rank, the caller's for rank 0. It knows nothing of what the ranks do: bodies that wait for one another are
/// told of a failure by the listener of <see cref="Run"/>. One run at a time.
/// </summary>
internal sealed class RankThreads : IDisposable
{
    private readonly object _gate = new();
    private readonly Thread[] _threads;
    private Action<int>? _execute;
    private long _round;
    private int _running;
    private bool _stopping;

    public RankThreads(int ranks)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(ranks, 1);
        _threads = [.. Enumerable.Range(1, ranks - 1).Select(rank =>
            new Thread(() => Loop(rank)) { IsBackground = true, Name = $"FlexLLM rank {rank}" })];
        foreach (Thread thread in _threads)
        {
            thread.Start();
        }
    }

    public int Ranks => _threads.Length + 1;

    /// <summary>
    /// Runs the body once for each rank, all at the same time, and returns when all have ended; then the first exception in time
    /// is thrown. <paramref name="ended"/> is called on a rank's thread as its body ends, with its exception if it threw: the place
    /// to wake those who wait for it. It must not throw.
    /// </summary>
    public void Run(Action<int> body, Action<int, Exception?>? ended = null)
    {
        ExceptionDispatchInfo? first = null;
        Start(Execute);
        Execute(0);
        lock (_gate)
        {
            while (_running > 0)
            {
                Monitor.Wait(_gate);
            }

            _execute = null;
        }

        first?.Throw();

        void Execute(int rank)
        {
            Exception? failure = null;
            try
            {
                body(rank);
            }
            catch (Exception e)
            {
                // Before anybody hears of it: what others throw because of it comes later.
                Interlocked.CompareExchange(ref first, ExceptionDispatchInfo.Capture(e), null);
                failure = e;
            }

            ended?.Invoke(rank, failure);
        }
    }

    /// <summary>Waits for the bodies that run on the threads of ranks 1 and up. Not from one of them.</summary>
    public void Dispose()
    {
        Check.That(!_threads.Contains(Thread.CurrentThread));
        lock (_gate)
        {
            _stopping = true;
            Monitor.PulseAll(_gate);
        }

        foreach (Thread thread in _threads)
        {
            thread.Join();
        }
    }

    private void Start(Action<int> execute)
    {
        lock (_gate)
        {
            ObjectDisposedException.ThrowIf(_stopping, this);
            Check.That(_execute is null);
            _execute = execute;
            _running = _threads.Length;
            _round++;
            Monitor.PulseAll(_gate);
        }
    }

    private void Loop(int rank)
    {
        for (long seen = 0; Next(ref seen) is { } execute;)
        {
            execute(rank);
            lock (_gate)
            {
                _running--;
                Monitor.PulseAll(_gate);
            }
        }
    }

    /// <summary>The next run's work, or null to stop. A run that began before the stop is still run: its caller waits.</summary>
    private Action<int>? Next(ref long seen)
    {
        lock (_gate)
        {
            while (_round == seen && !_stopping)
            {
                Monitor.Wait(_gate);
            }

            bool isNew = _round != seen;
            seen = _round;
            return isNew ? _execute : null;
        }
    }
}
