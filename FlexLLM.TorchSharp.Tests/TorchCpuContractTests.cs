using FlexLLM.Backends;

namespace FlexLLM.Tests;

/// <summary>libtorch on the CPU computes what every backend should, within the tolerances of the CPU backend.</summary>
[TorchFixture]
internal sealed class TorchCpuContractTests : TorchCpuContract
{
    protected override IComputeBackend CreateBackend() => TorchBackend.Create("cpu").CreateBackend();
}
