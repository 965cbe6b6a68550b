using FlexLLM.Backends;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>What a backend must do besides, to promise the same bits for every schedule and every number of threads.</summary>
internal abstract class DeterministicBackendContract : BackendContract
{
    [TestCaseSource(typeof(DeterminismChecks), nameof(DeterminismChecks.Names))]
    public void Operation_AnySplit_GivesTheSameBits(string operation) =>
        DeterminismChecks.AnySplit(Backend, operation, 59);

    [TestCaseSource(typeof(DeterminismChecks), nameof(DeterminismChecks.Names))]
    public void Operation_AnyThreads_GivesTheSameBits(string operation)
    {
        using IComputeBackend one = CreateBackend(threads: 1);
        using IComputeBackend two = CreateBackend(threads: 2);
        using IComputeBackend five = CreateBackend(threads: 5);
        DeterminismChecks.SameBits(operation, 3, one, two, five);
        DeterminismChecks.SameBits(operation, DeterminismChecks.RowsForThreads(operation), one, two, five);
    }

    protected override IComputeBackend CreateBackend() => CreateBackend(threads: 2);

    protected abstract IComputeBackend CreateBackend(int threads);
}
