using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Backends.Group;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>A group of devices is a device: where every rank has the same, it does what one would, with the same bits.</summary>
[TestFixture]
internal sealed class GroupBackendContractTests : DeterministicBackendContract
{
    protected override int Devices => 2;

    protected override IComputeBackend CreateBackend(int threads) => new GroupBackend([new CpuBackend(threads), new CpuBackend(threads)]);
}
