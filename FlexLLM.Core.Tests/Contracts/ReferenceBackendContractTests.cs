using FlexLLM.Backends;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>The contract can be met.</summary>
[TestFixture]
internal sealed class ReferenceBackendContractTests : BackendContract
{
    [TestCaseSource(typeof(DeterminismChecks), nameof(DeterminismChecks.Names))]
    public void Operation_AnySplit_GivesTheSameBits(string operation) => DeterminismChecks.AnySplit(Backend, operation, 23);

    protected override IComputeBackend CreateBackend() => new ReferenceBackend();
}
