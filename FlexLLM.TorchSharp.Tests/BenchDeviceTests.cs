using FlexLLM.Backends;
using FlexLLM.Benchmarks;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>The benchmarks' --backend torch, with TorchSharp and without it.</summary>
[TestFixture]
internal sealed class BenchDeviceTests
{
    private static readonly DeviceChoice Torch = new(IsTorch: true, "cpu");

    [Test]
    public void Create_BuiltAgainstTheContract_SaysHowToBuild()
    {
        if (BenchDevice.HasTorchSharp())
        {
            Assert.Ignore("TorchSharp is present.");
        }

        FlexLlmException? error = Assert.Throws<FlexLlmException>(() => BenchDevice.Create(Torch, threads: 1));
        Assert.That(
            error!.Message,
            Does.Contain("-p:UseTorchSharpPackage=true").And.Contain("TorchSharp-cuda-linux").And.Contain("-p:TorchSharpAssembly=FILE"));
    }

    [Test]
    public void Create_WithTorchSharp_OpensTheDevice()
    {
        if (TorchFixtureAttribute.Reason is string reason)
        {
            Assert.Ignore(reason);
        }

        using IComputeBackend backend = BenchDevice.Create(Torch, threads: 1).CreateBackend();
        Assert.That(backend.Name, Is.EqualTo("torch (cpu)"));
        using IComputeBackend narrow = BenchDevice.Create(Torch with { Bf16Kv = true }, threads: 1).CreateBackend();
        Assert.That(narrow.Name, Is.EqualTo("torch (cpu, BF16 KV cache)"));
        using IComputeBackend activations = BenchDevice.Create(Torch with { Bf16Activations = true }, threads: 1).CreateBackend();
        Assert.That(activations.Name, Is.EqualTo("torch (cpu, BF16 activations)"));
    }

    [Test]
    public void Create_ManagedBackend_NeedsNoTorchSharp()
    {
        using IComputeBackend backend = BenchDevice.Create(DeviceChoice.Cpu, threads: 1).CreateBackend();
        Assert.That(backend.Name, Is.EqualTo("cpu (1 thread)"));
    }
}
