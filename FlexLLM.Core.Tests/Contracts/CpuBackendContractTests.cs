using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>The CPU backend computes what it should, and promises the same bits besides.</summary>
[TestFixture]
internal sealed class CpuBackendContractTests : DeterministicBackendContract
{
    protected override IComputeBackend CreateBackend(int threads) => new CpuBackend(threads);
}
