using FlexLLM.Backends.Group;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends.Group;

[TestFixture]
internal sealed class RankThreadsTests
{
    [Test]
    public void Run_AnyRanks_RunsEachRankOnceAndTogether([Values(1, 2, 4)] int ranks)
    {
        using RankThreads threads = new(ranks);
        using Barrier barrier = new(ranks);
        for (int round = 0; round < 200; round++)
        {
            int[] counts = new int[ranks];
            GroupRig.Soon(() => threads.Run(rank =>
            {
                Interlocked.Increment(ref counts[rank]);
                barrier.SignalAndWait();
            }));
            Assert.That(counts, Is.All.EqualTo(1));
        }
    }

    [Test]
    public void Run_RanksThrow_WaitsForAllAndThrowsTheFirst()
    {
        using RankThreads threads = new(3);
        using ManualResetEventSlim thrown = new(false);
        List<(int Rank, string? Failure)> ended = [];
        InvalidOperationException? first = null;
        GroupRig.Soon(() => first = Assert.Throws<InvalidOperationException>(() => threads.Run(
            rank =>
            {
                if (rank == 1)
                {
                    throw new InvalidOperationException("first");
                }

                thrown.Wait();
                if (rank == 0)
                {
                    throw new IOException("second");
                }
            },
            (rank, failure) =>
            {
                lock (ended)
                {
                    ended.Add((rank, failure?.Message));
                }

                thrown.Set();
            })));

        Assert.That(first!.Message, Is.EqualTo("first"));
        Assert.That(ended[0], Is.EqualTo((1, "first")));
        Assert.That(ended, Is.EquivalentTo(new (int, string?)[] { (0, "second"), (1, "first"), (2, null) }));
        Assert.That(() => GroupRig.Soon(() => threads.Run(_ => { })), Throws.Nothing, "the threads go on");
    }

    [Test]
    public void Dispose_Twice_EndsTheThreads()
    {
        RankThreads threads = new(3);
        GroupRig.Soon(threads.Dispose);
        GroupRig.Soon(threads.Dispose);
        Assert.That(() => threads.Run(_ => { }), Throws.TypeOf<ObjectDisposedException>());
        Assert.That(() => new RankThreads(0), Throws.InstanceOf<ArgumentException>());
    }
}
