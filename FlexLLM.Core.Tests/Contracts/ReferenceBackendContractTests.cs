using FlexLLM.Backends;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

[TestFixture]
internal sealed class ReferenceBackendContractTests : BackendContract
{
    protected override IComputeBackend CreateBackend() => new ReferenceBackend();
}
