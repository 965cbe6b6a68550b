using FlexLLM.Backends;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>
/// The same with keys and values kept in BF16, within the same tolerances: attention and its gradient are compared with those of the
/// rounded keys and values, so that nothing but their rounding, to nearest even, may differ from F32.
/// </summary>
[TorchFixture]
internal sealed class TorchBf16CacheContractTests : TorchCpuContract
{
    protected override DType KvType => DType.BF16;

    [Test]
    public void KvCacheBytes_AnyShape_AreHalfOfThoseOfF32()
    {
        using IComputeBackend wide = TorchBackend.Create("cpu").CreateBackend();
        Assert.That(Backend.KvCacheBytes(3, 20, 2, 34), Is.EqualTo(2L * 3 * 20 * 16 * 2 * 34 * 2));
        Assert.That(wide.KvCacheBytes(3, 20, 2, 34), Is.EqualTo(2 * Backend.KvCacheBytes(3, 20, 2, 34)));
    }

    [Test]
    public void Control_KeysAndValuesNotRounded_FailTheSameTolerances()
    {
        Assert.Throws<AssertionException>(() => DecodeRows([17, 1, 40, 40, 5, 33], DType.F32));
        Assert.Throws<AssertionException>(() => AttentionChecks.Stored(Backend, DType.F32));
        Assert.Throws<AssertionException>(() => MemoryChecks.Description(Backend, DType.F32));
    }

    protected override IComputeBackend CreateBackend() =>
        TorchBackend.Create("cpu", new TorchOptions { Bf16KvCache = true }).CreateBackend();
}
