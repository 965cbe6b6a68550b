using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>libtorch on the CPU computes what every backend should, within the tolerances of the CPU backend.</summary>
[TorchFixture]
internal sealed class TorchCpuContractTests : BackendContract
{
    [Test]
    public void Operations_ManyCalls_LeaveNoTensor()
    {
        AllOperations();
        long before = torch.Tensor.TotalCount;
        for (int i = 0; i < 20; i++)
        {
            AllOperations();
        }

        Assert.That(torch.Tensor.TotalCount, Is.EqualTo(before));
        using DeviceTensor kept = Backend.Allocate(2, 3);
        Assert.That(torch.Tensor.TotalCount, Is.EqualTo(before + 1), "Control: one that lives is counted.");
    }

    [Test]
    public void Attention_ManyDecodeRows_MatchesReference()
    {
        Part[] parts = [.. Enumerable.Range(0, 24).Select(i => new Part(i * 7 % 40, 1, i % 2))];
        AttentionChecks.Forward(Backend, new HeadShape(2, 3, 8), keepLogSumExp: false, 1, parts);
        AttentionChecks.Forward(Backend, new HeadShape(2, 3, 8), keepLogSumExp: false, 1, new(17, 1), new(17, 1), new(17, 1));
    }

    [Test]
    public void Allocate_MoreThanThereIs_SaysSoAndHoldsNothing()
    {
        long before = Backend.AllocatedBytes;
        Assert.That(() => Backend.Allocate(int.MaxValue, 1 << 20), Throws.InstanceOf<OutOfMemoryException>());
        using DeviceKvCache cache = Backend.CreateKvCache(2, 16, 8, 1024);
        Assert.That(() => Backend.ResizeKvCache(cache, 1 << 27), Throws.InstanceOf<OutOfMemoryException>());
        Assert.That(cache.Blocks, Is.EqualTo(16));
        Assert.That(Backend.AllocatedBytes - before, Is.EqualTo(Backend.KvCacheBytes(2, 16, 8, 1024)));
    }

    [Test]
    public void Tensor_OwnerFreed_TakesItsViewsAlong()
    {
        DeviceTensor owner = Backend.Allocate(8, 16);
        DeviceTensor view = Backend.View(owner, 32, 2, 8);
        Backend.Upload(new float[16], view);
        owner.Dispose();
        Assert.That(() => Backend.Upload(new float[16], view), Throws.TypeOf<UnreachableException>());
    }

    protected override IComputeBackend CreateBackend() => TorchBackend.Create("cpu").CreateBackend();

    private void AllOperations()
    {
        MemoryChecks.Accounting(Backend);
        MemoryChecks.Resize(Backend, 20, 16, 48);
        MemoryChecks.CreateWeight(Backend, DType.F16, DType.BF16);
        DenseChecks.RmsNorm(Backend, 5, 37, 3);
        DenseChecks.RmsNormBackward(Backend, 5, 37, 3, accumulate: true);
        DenseChecks.Linear(Backend, 5, 37, 29, DType.BF16, bias: true, accumulate: true);
        DenseChecks.LinearBackwardInput(Backend, 5, 37, 29, DType.BF16, accumulate: false);
        DenseChecks.Rope(Backend, 5, 3, 10, inverse: true);
        DenseChecks.SiluGateBackward(Backend, 5, 37);
        DenseChecks.ReluBackward(Backend, 5, 37);
        LoraChecks.Forward(Backend, 37, 29, [4, 20], 5, 0, 7);
        LoraChecks.Backward(Backend, 5, 37, 29, 4, withDx: true);
        ColumnChecks.ScaleColumnsBackward(Backend, 5, 37, accumulate: true, inPlace: true);
        PackChecks.RoundTrip(Backend, 5, 37, Primitives.PackedFormat.BF16);
        AttentionChecks.Forward(Backend, new HeadShape(2, 2, 6), keepLogSumExp: false, 1, new(3, 1), new(9, 1), new(0, 20));
        AttentionChecks.Backward(Backend, new HeadShape(2, 2, 6), 30, 3, 20);
        LossChecks.CrossEntropy(Backend, 7, 21, 83, 2);
        LossChecks.Logits(Backend, 5, 37, 83, DType.BF16);
        OptimizerChecks.AdamW(Backend, 5, 13, AdamWOptions[0]);
        OptimizerChecks.Sgd(Backend, 5, 13, new SgdStepOptions(0.1f, 0.9f, true, 0.1f));
    }
}
