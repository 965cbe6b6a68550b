using FlexLLM.Backends;

namespace FlexLLM.Tests.Support;

/// <summary>
/// The device of every test that is about the engine and not about a backend. Here it is the managed one; a project that compiles
/// these tests with a class of this name of its own runs them on another.
/// </summary>
internal static class TestDevice
{
    /// <summary>The device computes bit by bit what the managed backend does, and counts its threads and its scratch memory.</summary>
    public static bool IsManaged => true;

    /// <summary>How far a loss, a logit, or a gradient relative to its norm may be off when only the order of sums is another.</summary>
    public static double Tolerance => 0;

    /// <summary>Why there is no such device; null where there is.</summary>
    public static string? Missing => null;

    public static ComputeDevice Of(int threads = 1) => ComputeDevice.Cpu(threads);

    public static IComputeBackend CreateBackend(int threads = 1) => Of(threads).CreateBackend();

    /// <summary>The device of one rank of a group.</summary>
    public static IComputeBackend CreateRank(int rank)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(rank);
        return CreateBackend();
    }
}
