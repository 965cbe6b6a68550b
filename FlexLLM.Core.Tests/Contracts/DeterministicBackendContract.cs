using FlexLLM.Backends;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>What a backend must do besides, to promise the same bits for every schedule and every number of threads.</summary>
internal abstract class DeterministicBackendContract : BackendContract
{
    [TestCaseSource(typeof(DeterminismChecks), nameof(DeterminismChecks.Names))]
    public void Operation_AnySplit_GivesTheSameBits(string operation) =>
        DeterminismChecks.AnySplit(Backend, operation, 41);

    [TestCaseSource(typeof(DeterminismChecks), nameof(DeterminismChecks.Names))]
    public void Operation_AnyThreads_GivesTheSameBits(string operation)
    {
        using IComputeBackend one = CreateBackend(threads: 1);
        foreach (int threads in (int[])[2, 3, 5])
        {
            using IComputeBackend many = CreateBackend(threads);
            DeterminismChecks.SameBits(one, many, operation, 3);
            DeterminismChecks.SameBits(one, many, operation, 130);
        }
    }

    protected override IComputeBackend CreateBackend() => CreateBackend(threads: 2);

    protected abstract IComputeBackend CreateBackend(int threads);
}
