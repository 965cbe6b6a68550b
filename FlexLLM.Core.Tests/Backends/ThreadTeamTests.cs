using FlexLLM.Backends.Cpu;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends;

[TestFixture]
internal sealed class ThreadTeamTests
{
    private const long Large = long.MaxValue;

    [TestCase(1)]
    [TestCase(2)]
    [TestCase(5)]
    public unsafe void Run_ManyJobs_RunsEachItemOnce(int threads)
    {
        using ThreadTeam team = new(threads);
        int[] counts = new int[300];
        fixed (int* first = counts)
        {
            for (int round = 0; round < 2000; round++)
            {
                int items = round % counts.Length;
                Array.Clear(counts);
                team.Run(new CountJob(first, -1), items, Large);
                Assert.That(counts.Take(items), Is.All.EqualTo(1), $"round {round}");
                Assert.That(counts.Skip(items), Is.All.Zero, $"round {round}");
            }
        }
    }

    [Test]
    public unsafe void Run_ItemThrows_RethrowsAndSurvives([Values(1, 3)] int threads)
    {
        using ThreadTeam team = new(threads);
        int[] counts = new int[64];
        fixed (int* first = counts)
        {
            for (int round = 0; round < 200; round++)
            {
                CountJob job = new(first, round % counts.Length);
                Assert.That(() => team.Run(job, 64, Large), Throws.InvalidOperationException);
                Array.Clear(counts);
                team.Run(new CountJob(first, -1), counts.Length, Large);
                Assert.That(counts, Is.All.EqualTo(1));
            }
        }
    }

    [Test]
    public unsafe void Run_WorkersParked_WakesThem()
    {
        using ThreadTeam team = new(3);
        int[] workers = new int[3];
        using ManualResetEventSlim never = new(false);
        fixed (int* first = workers)
        {
            for (int round = 0; round < 5; round++)
            {
                never.Wait(20);
                Array.Clear(workers);
                team.Run(new MeetJob(first, 3), 3, Large);
                Assert.That(workers, Is.All.EqualTo(1), "every thread took one item, or they could not all have met");
            }
        }
    }

    [Test]
    public unsafe void Run_SmallJob_StaysOnTheCaller()
    {
        using ThreadTeam team = new(4);
        int[] workers = new int[4];
        fixed (int* first = workers)
        {
            team.Run(new MeetJob(first, 1), 100, 1);
        }

        Assert.That(workers, Is.EqualTo((int[])[100, 0, 0, 0]));
    }

    [Test]
    public unsafe void Run_SteadyState_AllocatesNothing()
    {
        using ThreadTeam team = new(2);
        int[] counts = new int[8];
        fixed (int* first = counts)
        {
            team.Run(new CountJob(first, -1), 8, Large);
            long before = GC.GetAllocatedBytesForCurrentThread();
            for (int i = 0; i < 100; i++)
            {
                team.Run(new CountJob(first, -1), 8, Large);
            }

            Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
        }
    }

    [Test]
    public void Dispose_Twice_DoesNotHang()
    {
        ThreadTeam team = new(4);
        team.Dispose();
        Assert.That(team.Dispose, Throws.Nothing);
    }

    private readonly unsafe struct CountJob(int* counts, int throwAt) : IParallelJob
    {
        private readonly int* _counts = counts;
        private readonly int _throwAt = throwAt;

        public void Run(int item, int worker)
        {
            if (item == _throwAt)
            {
                throw new InvalidOperationException("planted");
            }

            Interlocked.Increment(ref _counts[item]);
        }
    }

    // Waits until so many workers are inside.
    private readonly unsafe struct MeetJob(int* workers, int meeting) : IParallelJob
    {
        private readonly int* _workers = workers;
        private readonly int _meeting = meeting;

        public void Run(int item, int worker)
        {
            Interlocked.Increment(ref _workers[worker]);
            int* workers = _workers;
            int meeting = _meeting;
            bool met = SpinWait.SpinUntil(() => new ReadOnlySpan<int>(workers, meeting).IndexOf(0) < 0, 10_000);
            if (!met)
            {
                throw new InvalidOperationException("The others never came.");
            }
        }
    }
}
