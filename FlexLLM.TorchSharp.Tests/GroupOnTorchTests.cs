using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Backends.Torch;
using FlexLLM.Primitives;
using FlexLLM.Tests.Backends.Group;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>What groups of libtorch devices must do beside what all groups must.</summary>
[TorchFixture]
internal sealed class GroupOnTorchTests
{
    private const int Rows = 6;

    [Test]
    public void Collectives_OneThousand_LeaveNoTensor([Values(2, 4)] int ranks)
    {
        using var rig = new GroupRig(ranks);
        long[] before = new long[ranks];
        long[] after = new long[ranks];
        using var together = new Barrier(ranks);
        rig.Run(communicator =>
        {
            int rank = communicator.Rank;
            using DeviceTensor whole = rig.Allocate(rank, Rows, 8);
            using DeviceTensor rows = rig.Allocate(rank, Shard.Of(Rows, rank, ranks).Count, 8);
            using DeviceTensor columns = rig.Allocate(rank, Rows, 8 / ranks);
            All(communicator, whole, rows, columns);
            Meet(before);
            for (int i = 0; i < 1000; i++)
            {
                All(communicator, whole, rows, columns);
            }

            Meet(after);

            void Meet(long[] counts)
            {
                together.SignalAndWait();
                counts[rank] = torch.Tensor.TotalCount;
                together.SignalAndWait();
            }
        });

        Assert.That(after, Is.EqualTo(before));
        long count = torch.Tensor.TotalCount;
        using DeviceTensor kept = rig.Allocate(0, 1, 1);
        Assert.That(torch.Tensor.TotalCount, Is.EqualTo(count + 1), "Control: one that lives is counted.");
    }

    [Test]
    public void AllReduce_BesideTheManagedBackend_GoesThroughTheHost()
    {
        using IComputeBackend torch = TorchBackend.Create("cpu").CreateBackend();
        using IComputeBackend managed = ComputeDevice.Cpu(1).CreateBackend();
        IComputeBackend[] backends = [torch, managed];
        using var group = new InProcessGroup(backends);
        Assert.That(group.IsDirect, Is.False);
        group.Run(communicator =>
        {
            IComputeBackend backend = backends[communicator.Rank];
            using DeviceTensor x = backend.Allocate(1, 3);
            backend.Upload([1, 2, communicator.Rank], x);
            communicator.AllReduce(x);
            float[] sum = new float[3];
            backend.Download(x, sum);
            Assert.That(sum, Is.EqualTo(new float[] { 2, 4, 1 }));
        });
    }

    [TestCase(DType.BF16, true)]
    [TestCase(DType.F32, false)]
    public void AllReduce_OfBf16Activations_IsDirectWithTheirKindAndRoundsTheSum(DType other, bool isDirect)
    {
        using IComputeBackend narrow = Create(DType.BF16);
        using IComputeBackend beside = Create(other);
        IComputeBackend[] backends = [narrow, beside];
        using var group = new InProcessGroup(backends);
        Assert.That(group.IsDirect, Is.EqualTo(isDirect));
        group.Run(communicator =>
        {
            IComputeBackend backend = backends[communicator.Rank];
            using DeviceTensor x = backend.Allocate(1, 3, TensorUse.Activation);
            backend.Upload(communicator.Rank == 0 ? [1, 256, 3] : [0.5f, 0.5f, -1], x);
            communicator.AllReduce(x);
            float[] sum = new float[3];
            backend.Download(x, sum);
            Assert.That(sum, Is.EqualTo(x.Type == DType.BF16 ? [1.5f, 256, 2] : new float[] { 1.5f, 256.5f, 2 }));
        });

        static IComputeBackend Create(DType activations) =>
            TorchBackend.Create("cpu", new TorchOptions { Bf16Activations = activations == DType.BF16 }).CreateBackend();
    }

    [Test]
    public void PeerKind_OfHostAndGpu_Differ()
    {
        using var host = new TorchComputeBackend(new torch.Device(DeviceType.CPU));
        using var gpu = new TorchComputeBackend(new torch.Device(DeviceType.CUDA, 0));
        using var other = new TorchComputeBackend(new torch.Device(DeviceType.CUDA, 1));
        Assert.That(gpu.PeerKind, Is.Not.EqualTo(host.PeerKind).And.EqualTo(other.PeerKind));
    }

    private static void All(Communicator communicator, DeviceTensor whole, DeviceTensor rows, DeviceTensor columns)
    {
        communicator.AllReduce(whole);
        communicator.AllGatherRows(rows, whole);
        communicator.AllGatherColumns(columns, whole);
        communicator.ReduceScatterRows(whole, rows);
        communicator.ReduceScatterColumns(whole, columns);
        communicator.AllToAllRowsToColumns(rows, columns);
        communicator.AllToAllColumnsToRows(columns, rows);
    }
}
