using System.Runtime.CompilerServices;
using System.Runtime.ExceptionServices;
using System.Runtime.InteropServices;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>Work cut into numbered items that may run in any order on any thread.</summary>
internal interface IParallelJob
{
    /// <summary>Runs one item. <paramref name="worker"/> in [0, threads) names the thread, for scratch memory.</summary>
    void Run(int item, int worker);
}

/// <summary>
/// The calling thread and threads - 1 workers that take items from a shared counter. Dispatch allocates nothing: a job is an
/// unmanaged struct on the caller's stack. A worker that wakes too late misses the job, nobody waits for it; the caller waits
/// only for workers that are inside an item. Not reentrant, one caller at a time.
/// </summary>
internal sealed unsafe class ThreadTeam : IDisposable
{
    private const long OpenFlag = 1L << 31;
    private const long ActiveMask = OpenFlag - 1;
    private const int SpinsBeforePark = 1500;
    private const int SpinsBeforeYield = 4000;

    // Below this many multiply-adds (a few microseconds of one core) waking somebody costs more than it saves.
    private const long WorkMin = 1 << 16;

    private readonly Worker[] _workers;
    private Shared _shared;
    private void* _job;
    private delegate*<ThreadTeam, int, void> _drain;
    private int _items;
    private volatile bool _stopping;
    private ExceptionDispatchInfo? _failure;

    public ThreadTeam(int threads)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(threads, 1);
        _workers = new Worker[threads - 1];
        for (int i = 0; i < _workers.Length; i++)
        {
            _workers[i] = new Worker(this, i + 1);
        }
    }

    /// <summary>Threads that run items, the caller included.</summary>
    public int Threads => _workers.Length + 1;

    /// <summary>
    /// Runs items [0, items) and returns when all are done. <paramref name="work"/> is their rough total cost in multiply-adds; a
    /// small job stays on the caller's thread. The first exception of an item is rethrown here, remaining items are dropped.
    /// </summary>
    public void Run<TJob>(TJob job, int items, long work)
        where TJob : unmanaged, IParallelJob
    {
        if (_workers.Length == 0 || items <= 1 || work < WorkMin)
        {
            for (int i = 0; i < items; i++)
            {
                job.Run(i, 0);
            }

            return;
        }

        Check.That(!_stopping);
        _job = &job;
        _drain = &Drain<TJob>;
        _items = items;
        _failure = null;
        _shared.Next = 0;
        long generation = (_shared.State >> 32) + 1;
        Interlocked.Exchange(ref _shared.State, (generation << 32) | OpenFlag);
        for (int i = 0; i < _workers.Length && i < items - 1; i++)
        {
            _workers[i].Wake();
        }

        Drain<TJob>(this, 0);
        Interlocked.And(ref _shared.State, ~OpenFlag);
        for (int spins = 0; (Volatile.Read(ref _shared.State) & ActiveMask) != 0; spins++)
        {
            if (spins < SpinsBeforeYield)
            {
                Thread.SpinWait(1);
            }
            else
            {
                Thread.Yield();
            }
        }

        _job = null;
        _failure?.Throw();
    }

    public void Dispose()
    {
        if (_stopping)
        {
            return;
        }

        _stopping = true;
        foreach (Worker worker in _workers)
        {
            worker.Dispose();
        }
    }

    private static void Drain<TJob>(ThreadTeam team, int worker)
        where TJob : unmanaged, IParallelJob
    {
        TJob* job = (TJob*)team._job;
        int items = team._items;
        try
        {
            for (int item; (item = Interlocked.Increment(ref team._shared.Next) - 1) < items;)
            {
                job->Run(item, worker);
            }
        }
        catch (Exception e)
        {
            Interlocked.CompareExchange(ref team._failure, ExceptionDispatchInfo.Capture(e), null);
            Volatile.Write(ref team._shared.Next, items);
        }
    }

    /// <summary>Joins the open job unless this worker has been in it. True when it ran.</summary>
    private bool TryJoin(ref long lastGeneration, int worker)
    {
        long state = Volatile.Read(ref _shared.State);
        long generation = state >> 32;
        if ((state & OpenFlag) == 0 || generation == lastGeneration
            || Interlocked.CompareExchange(ref _shared.State, state + 1, state) != state)
        {
            return false;
        }

        lastGeneration = generation;
        _drain(this, worker);
        Interlocked.Decrement(ref _shared.State);
        return true;
    }

    // The item counter and the state (generation, open flag, workers inside) on cache lines of their own.
    [StructLayout(LayoutKind.Explicit, Size = 320)]
    private struct Shared
    {
        [FieldOffset(128)]
        public int Next;

        [FieldOffset(256)]
        public long State;
    }

    private sealed class Worker : IDisposable
    {
        private readonly ThreadTeam _team;
        private readonly int _index;
        private readonly AutoResetEvent _wake = new(false);
        private readonly Thread _thread;
        private int _parked;

        public Worker(ThreadTeam team, int index)
        {
            _team = team;
            _index = index;
            _thread = new Thread(Loop) { IsBackground = true, Name = $"FlexLLM cpu {index}" };
            _thread.Start();
        }

        public void Wake()
        {
            if (Volatile.Read(ref _parked) == 1 && Interlocked.Exchange(ref _parked, 0) == 1)
            {
                _wake.Set();
            }
        }

        public void Dispose()
        {
            _wake.Set();
            _thread.Join();
            _wake.Dispose();
        }

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        private void Loop()
        {
            long lastGeneration = 0;
            int spins = 0;
            while (!_team._stopping)
            {
                if (_team.TryJoin(ref lastGeneration, _index))
                {
                    spins = 0;
                }
                else if (++spins < SpinsBeforePark)
                {
                    Thread.SpinWait(1);
                }
                else
                {
                    // A job opened between the last look and the flag would be missed: look again before sleeping. Missing
                    // one costs speed only, the caller drains alone.
                    Interlocked.Exchange(ref _parked, 1);
                    bool open = (Volatile.Read(ref _team._shared.State) & OpenFlag) != 0;
                    bool joinable = open && Volatile.Read(ref _team._shared.State) >> 32 != lastGeneration;
                    if (_team._stopping || (joinable && Interlocked.Exchange(ref _parked, 0) == 1))
                    {
                        spins = 0;
                        continue;
                    }

                    _wake.WaitOne();
                    spins = 0;
                }
            }
        }
    }
}
