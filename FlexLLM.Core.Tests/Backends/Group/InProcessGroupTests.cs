using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Tests.Contracts;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends.Group;

/// <summary>What happens when ranks fail, disagree, stop early, are cancelled or disposed: everyone hears of it, nobody hangs.</summary>
[DeviceFixture(true)]
[DeviceFixture(false)]
internal sealed class InProcessGroupTests(bool isDirect)
{
    [Test]
    public void Run_RankThrows_TheOthersNameItAndItsExceptionIsThrown([Values(2, 3, 4)] int ranks, [Values] bool last)
    {
        using GroupRig rig = new(ranks, isDirect);
        int thrower = last ? ranks - 1 : 0;
        Exception?[] seen = Watch(rig, (communicator, x) =>
        {
            communicator.AllReduce(x);
            if (communicator.Rank == thrower)
            {
                throw new InvalidOperationException("planted");
            }

            communicator.AllReduce(x);
        }, out Exception? thrown);

        Assert.That(thrown, Is.TypeOf<InvalidOperationException>().With.Message.EqualTo("planted"));
        for (int rank = 0; rank < ranks; rank++)
        {
            Assert.That(seen[rank], rank == thrower
                ? Is.SameAs(thrown)
                : Is.TypeOf<FlexLlmException>()
                    .With.Message.EqualTo($"Rank {thrower} of {ranks} failed: planted")
                    .And.InnerException.SameAs(thrown));
        }

        Assert.That(() => rig.Run(_ => { }), Throws.TypeOf<FlexLlmException>(), "the group stays failed");
        using DeviceTensor later = rig.Allocate(0, 1, 1);
        Assert.That(() => rig.Group[0].AllReduce(later), Throws.TypeOf<FlexLlmException>());
    }

    [Test]
    public void Run_BackendThrowsInsideACollective_FailsOnAllRanks()
    {
        using GroupRig rig = new(3, isDirect, (rank, inner) => rank == 1 ? new Unreadable(inner) : inner);

        Exception?[] seen = Watch(rig, (communicator, x) => communicator.AllReduce(x), out Exception? thrown);

        Assert.That(thrown, Is.TypeOf<IOException>());
        Assert.That(seen[1], Is.SameAs(thrown));
        Assert.That(new[] { seen[0]!.Message, seen[2]!.Message }, Is.All.EqualTo("Rank 1 of 3 failed: planted"));
    }

    [Test]
    public void Run_DifferentOperation_FailsOnAllRanks()
    {
        using GroupRig rig = new(3, isDirect);
        Exception?[] seen = Watch(rig, (communicator, x) =>
        {
            if (communicator.Rank == 2)
            {
                communicator.ReduceScatterRows(x, x.Slice(0, 2));
            }
            else
            {
                communicator.AllReduce(x);
            }
        }, out Exception? thrown);

        Assert.That(seen, Is.All.TypeOf<FlexLlmException>());
        Assert.That(seen.Append(thrown).Select(e => e!.Message), Is.All.EqualTo(
            "The ranks make different calls: rank 0 AllReduce [6, 6], rank 1 AllReduce [6, 6], rank 2 ReduceScatterRows [6, 6]."));
    }

    [Test]
    public void Run_DifferentShape_FailsOnAllRanks()
    {
        using GroupRig rig = new(2, isDirect);
        Exception?[] seen = Watch(rig, (communicator, x) => communicator.AllReduce(x.Slice(0, 3 + communicator.Rank)), out _);

        Assert.That(seen, Is.All.TypeOf<FlexLlmException>());
        Assert.That(seen[0]!.Message, Does.Contain("rank 0 AllReduce [3, 6], rank 1 AllReduce [4, 6]"));
    }

    [Test]
    public void Run_PartOfTheWrongShape_BreaksAnInvariantOnThatRankAndFailsTheOthers()
    {
        using GroupRig rig = new(2, isDirect);
        Exception?[] seen = Watch(
            rig, (communicator, x) => communicator.AllGatherRows(x.Slice(0, communicator.Rank == 1 ? 2 : 3), x), out Exception? thrown);

        Assert.That(thrown, Is.TypeOf<UnreachableException>());
        Assert.That(seen[0], Is.TypeOf<FlexLlmException>().With.Message.StartsWith("Rank 1 of 2 failed"));
    }

    [Test]
    public void Run_RankReturnsEarly_TheOthersAreTold([Values] bool whileTheyWait)
    {
        using GroupRig rig = new(3, isDirect);
        Exception?[] seen = Watch(rig, (communicator, x) =>
        {
            if (communicator.Rank == 1)
            {
                SpinWait.SpinUntil(() => false, whileTheyWait ? 20 : 0); // Slow or not, they wait for it or find it gone.
                return;
            }

            communicator.AllReduce(x);
        }, out Exception? thrown);

        Assert.That(seen[1], Is.Null);
        Assert.That(new[] { seen[0], seen[2], thrown }, Is.All.TypeOf<FlexLlmException>());
        Assert.That(thrown!.Message, Does.Contain("do not make the same calls"));
    }

    [Test]
    public void Run_Cancelled_WakesTheWaitingRanks()
    {
        using GroupRig rig = new(2, isDirect);
        using CancellationTokenSource source = new();
        Exception? thrown = null;
        try
        {
            rig.Run(
                communicator =>
                {
                    if (communicator.Rank == 0)
                    {
                        using DeviceTensor x = rig.Allocate(0, 1, 1);
                        communicator.AllReduce(x);
                    }
                    else
                    {
                        source.Cancel();
                        source.Token.WaitHandle.WaitOne();
                    }
                },
                source.Token);
        }
        catch (Exception e)
        {
            thrown = e;
        }

        Assert.That(thrown, Is.InstanceOf<OperationCanceledException>());
        Assert.That(() => rig.Run(_ => { }, source.Token), Throws.InstanceOf<OperationCanceledException>());
        Assert.That(() => rig.Run(_ => { }), Throws.TypeOf<FlexLlmException>());
    }

    [Test]
    public async Task Dispose_WhileARankWaits_EndsTheRun()
    {
        using GroupRig rig = new(2, isDirect);
        TaskCompletionSource waits = new(TaskCreationOptions.RunContinuationsAsynchronously);
        using ManualResetEventSlim disposed = new(false);
        Task run = Task.Run(() => rig.Group.Run(communicator =>
        {
            if (communicator.Rank == 1)
            {
                waits.SetResult();
                using DeviceTensor x = rig.Allocate(1, 1, 1);
                communicator.AllReduce(x);
            }
            else
            {
                disposed.Wait();
            }
        }));
        await waits.Task.Soon();

        await Task.Run(rig.Group.Dispose).Soon();
        disposed.Set();

        Assert.That(await run.FaultAsync(), Is.TypeOf<FlexLlmException>().With.Message.EqualTo("The group has been disposed."));
        Assert.That(rig.Group.Dispose, Throws.Nothing, "twice");
    }

    [Test]
    public void Run_ManyTimes_KeepsTheThreadOfEachRank()
    {
        using GroupRig rig = new(4, isDirect);
        int[] threads = new int[4];
        for (int i = 0; i < 300; i++)
        {
            rig.Group.Run(communicator =>
            {
                int id = Environment.CurrentManagedThreadId;
                Assert.That(threads[communicator.Rank] is 0 || threads[communicator.Rank] == id);
                threads[communicator.Rank] = id;
            });
        }

        Assert.That(threads, Is.Unique);
    }

    [ManagedOnly("what passes between ranks is no object")]
    [Test]
    public void Collective_SteadyState_AllocatesNothing()
    {
        using GroupRig rig = new(2, isDirect);
        long[] allocated = new long[2];
        rig.Run(communicator =>
        {
            using DeviceTensor x = rig.Allocate(communicator.Rank, 5, 6);
            using DeviceTensor part = rig.Allocate(communicator.Rank, 5, 3);
            long before = 0;
            for (int i = 0; i < 40; i++)
            {
                before = i == 20 ? GC.GetAllocatedBytesForCurrentThread() : before;
                communicator.AllReduce(x);
                communicator.ReduceScatterColumns(x, part);
                communicator.AllGatherColumns(part, x);
            }

            allocated[communicator.Rank] = GC.GetAllocatedBytesForCurrentThread() - before;
        });

        Assert.That(allocated, Is.All.Zero);
    }

    /// <summary>What the body threw on each rank, and what the run threw. x is [6, 6].</summary>
    private static Exception?[] Watch(GroupRig rig, Action<Communicator, TensorSlice> body, out Exception? thrown)
    {
        Exception?[] seen = new Exception?[rig.Group.Ranks];
        thrown = null;
        try
        {
            rig.Run(communicator =>
            {
                using DeviceTensor x = rig.Allocate(communicator.Rank, 6, 6);
                try
                {
                    body(communicator, x);
                }
                catch (Exception e)
                {
                    seen[communicator.Rank] = e;
                    throw;
                }
            });
        }
        catch (Exception e)
        {
            thrown = e;
        }

        return seen;
    }

    private sealed class Unreadable(IComputeBackend inner) : DelegatingBackend(inner)
    {
        public override void Download(TensorSlice source, Span<float> destination) => throw new IOException("planted");

        public override void ReadPeer(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate) =>
            throw new IOException("planted");
    }
}
