using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>What every backend must do, and beside it what libtorch's must.</summary>
internal abstract class TorchCpuContract : BackendContract
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

    // Rows that follow each other are appended in one call and attend in one; the contract's own checks keep rows apart.
    [TestCase(new[] { 17, 1, 40, 40, 5, 33 })]
    [TestCase(new[] { 9, 9, 9 })]
    public void Attention_DecodeRowsSideBySide_MatchReference(int[] lengths) => DecodeRows(lengths, KvType);

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

    /// <summary>Compares with attention over keys and values rounded to a type.</summary>
    protected void DecodeRows(int[] lengths, DType kvType) => DecodeRows(Backend, lengths, kvType);

    /// <inheritdoc cref="DecodeRows(int[], DType)"/>
    /// <returns>What attention made of them.</returns>
    public static Matrix DecodeRows(IComputeBackend backend, int[] lengths, DType kvType, int bf16Roundings = 1)
    {
        const int layer = 1;
        HeadShape shape = new(KvHeads: 2, Group: 3, HeadDim: 8);
        using var bench = new Workbench(backend);
        var cache = new PagedCache(bench, shape, lengths.Sum(length => PagedCache.BlocksFor(length) + 1));
        Matrix[] keys = [.. lengths.Select(length => bench.Random(length, shape.KvColumns))];
        Matrix[] values = [.. lengths.Select(length => bench.Random(length, shape.KvColumns))];
        (Matrix k, Matrix v, Matrix q) = (
            new(lengths.Length, shape.KvColumns), new(lengths.Length, shape.KvColumns),
            bench.Random(lengths.Length, shape.QueryColumns));
        var segments = new AttentionSegment[lengths.Length];
        for (int i = 0; i < lengths.Length; i++)
        {
            int last = lengths[i] - 1;
            AttentionSegment prefix = cache.Append(
                keys[i].Slice(0, last), values[i].Slice(0, last), layer, cache.TakeTable(lengths[i]));
            segments[i] = prefix with { RowStart = i, RowCount = 1, PositionStart = last };
            k.SetRows(i, keys[i].Slice(last, 1));
            v.SetRows(i, values[i].Slice(last, 1));
        }

        Operand o = bench.Output(lengths.Length, shape.QueryColumns);
        backend.AppendKv(bench.Source(k), bench.Source(v), layer, segments);
        backend.Attention(bench.Source(q), o, layer, segments);
        for (int i = 0; i < lengths.Length; i++)
        {
            Matrix row = q.Slice(i, 1);
            (Matrix keysHeld, Matrix valuesHeld) = (keys[i].Rounded(kvType), values[i].Rounded(kvType));
            Matrix expected = Reference.Attention(row, keysHeld, valuesHeld, lengths[i] - 1, shape).O;
            Matrix magnitude = Reference.Attention(row, keysHeld, valuesHeld.Abs(), lengths[i] - 1, shape).O;
            Expect.Close($"row {i}", o.Read().Slice(i, 1), expected, magnitude, 200, bf16Roundings);
        }

        bench.Verify();
        return o.Read();
    }

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
        LoraChecks.DecodeRows(Backend, 37, 29, (4, 2), (4, 2), (4, 2));
        LoraChecks.Backward(Backend, 5, 37, 29, 4, withDx: true);
        ColumnChecks.ScaleColumnsBackward(Backend, 5, 37, accumulate: true, inPlace: true);
        PackChecks.RoundTrip(Backend, 5, 37, Primitives.PackedFormat.BF16);
        AttentionChecks.Forward(Backend, new HeadShape(2, 2, 6), keepLogSumExp: false, 1, new(3, 1), new(9, 1), new(0, 20));
        AttentionChecks.Backward(Backend, new HeadShape(2, 2, 6), 30, 3, 20);
        AttentionChecks.Stored(Backend, KvType);
        LossChecks.CrossEntropy(Backend, 7, 21, 83, 2);
        LossChecks.Logits(Backend, 5, 37, 83, DType.BF16);
        OptimizerChecks.AdamW(Backend, 5, 13, AdamWOptions[0]);
        OptimizerChecks.Sgd(Backend, 5, 13, new SgdStepOptions(0.1f, 0.9f, true, 0.1f));
    }
}
