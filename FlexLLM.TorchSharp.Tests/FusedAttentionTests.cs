using FlexLLM.Backends;
using FlexLLM.Backends.Torch;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>
/// Attention of requests as a GPU computes it with BF16 keys, values and activations: libtorch's fused one.
/// </summary>
[TorchFixture]
internal sealed class FusedAttentionTests
{
    // Of probabilities and of the result; libtorch 1.13, which has no fused kernel, rounds queries and scores as well, and was off by 3.3.
    private const int Bf16Roundings = 5;

    private TorchComputeBackend _backend = null!;

    [SetUp]
    public void SetUp() => _backend = Open(multipliesBf16: true);

    [TearDown]
    public void TearDown() => _backend.Dispose();

    [TestCase(new[] { 17, 1, 40, 40, 5, 33 })]
    [TestCase(new[] { 9, 9, 9 })]
    [TestCase(new[] { 40 })]
    [TestCase(new[] { 1 })]
    public void Attention_DecodeRows_MatchReference(int[] lengths) =>
        TorchCpuContract.DecodeRows(_backend, lengths, DType.BF16, Bf16Roundings);

    [TestCase(0, 5)]
    [TestCase(7, 20)]
    [TestCase(30, 2)]
    [TestCase(0, 40)]
    public void Attention_RowsOfAPrompt_MatchReference(int start, int count)
    {
        const int layer = 1;
        HeadShape shape = new(KvHeads: 2, Group: 3, HeadDim: 8);
        using TorchComputeBackend pieces = Open(multipliesBf16: true, elementsMax: 600);
        foreach (TorchComputeBackend backend in new[] { _backend, pieces })
        {
            using var bench = new Workbench(backend);
            var cache = new PagedCache(bench, shape, 8);
            (Matrix k, Matrix v) = (bench.Random(start + count, shape.KvColumns), bench.Random(start + count, shape.KvColumns));
            (Matrix q, Operand o) = (bench.Random(count, shape.QueryColumns), bench.Output(count, shape.QueryColumns));
            AttentionSegment whole = cache.Append(k, v, layer, cache.TakeTable(start + count));
            backend.Attention(bench.Source(q), o, layer, [whole with { RowStart = 0, RowCount = count, PositionStart = start }]);
            Matrix expected = Reference.Attention(q, k, v, start, shape).O;
            Matrix magnitude = Reference.Attention(q, k, v.Abs(), start, shape).O;
            Expect.Close("prompt", o.Read(), expected, magnitude, 200, Bf16Roundings);
            bench.Verify();
        }
    }

    // The rig: of the same numbers the host's way makes others.
    [Test]
    public void Control_TheHostsWay_IsAnother()
    {
        int[] lengths = [40, 33, 38];
        using TorchComputeBackend host = Open(multipliesBf16: false);
        double[] expected = TorchCpuContract.DecodeRows(host, lengths, DType.BF16).Values;
        Assert.That(TorchCpuContract.DecodeRows(_backend, lengths, DType.BF16, Bf16Roundings).Values, Is.Not.EqualTo(expected));
        Assert.That(TorchCpuContract.DecodeRows(host, lengths, DType.BF16).Values, Is.EqualTo(expected));
    }

    [Test]
    public void Attention_DecodeRowsAgain_LeaveNoTensor()
    {
        TorchCpuContract.DecodeRows(_backend, [9, 12], DType.BF16, Bf16Roundings);
        long before = torch.Tensor.TotalCount;
        TorchCpuContract.DecodeRows(_backend, [9, 12], DType.BF16, Bf16Roundings);
        Assert.That(torch.Tensor.TotalCount, Is.EqualTo(before));
    }

    private static TorchComputeBackend Open(bool multipliesBf16, long elementsMax = TorchContext.ElementsMaxDefault) => new(
        new torch.Device(DeviceType.CPU), elementsMax, kvType: DType.BF16, activationType: DType.BF16, multipliesBf16: multipliesBf16);
}
