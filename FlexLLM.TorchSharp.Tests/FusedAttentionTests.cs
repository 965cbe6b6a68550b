using FlexLLM.Backends;
using FlexLLM.Backends.Torch;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>
/// Decode rows as a GPU computes them with BF16 keys, values and activations: by libtorch's fused attention.
/// </summary>
[TorchFixture]
internal sealed class FusedAttentionTests
{
    // Of probabilities and of the result; libtorch 1.13, which has no fused kernel, rounds scores as well. One is 1.9 times too few.
    private const int Bf16Roundings = 3;

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

    private static TorchComputeBackend Open(bool multipliesBf16) => new(
        new torch.Device(DeviceType.CPU), kvType: DType.BF16, activationType: DType.BF16, multipliesBf16: multipliesBf16);
}
