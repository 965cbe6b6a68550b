using FlexLLM.Backends;

namespace FlexLLM.Tests.Support;

/// <summary>
/// Puts the tests of the engine on libtorch: on the CPU, or on the device that FLEXLLM_TEST_DEVICE names, such as "cuda:0". Of several,
/// such as "cuda:0,cuda:1", the first has all tests, and the ranks of a group take turns.
/// </summary>
internal static class TestDevice
{
    private static readonly Lazy<string?> Fault = new(() => Names.Select(FaultOf).FirstOrDefault(fault => fault is not null));

    public static bool IsManaged => false;

    public static double Tolerance => 1e-4;

    public static string? Missing => Fault.Value;

    private static string[] Names => Environment.GetEnvironmentVariable("FLEXLLM_TEST_DEVICE") is { Length: > 0 } names
        ? names.Split(',')
        : ["cpu"];

    // libtorch has threads of its own.
    public static ComputeDevice Of(int threads = 1)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(threads, 1);
        return TorchBackend.Create(Names[0]);
    }

    public static IComputeBackend CreateBackend(int threads = 1) => Of(threads).CreateBackend();

    public static IComputeBackend CreateRank(int rank) => TorchBackend.Create(Names[rank % Names.Length]).CreateBackend();

    /// <summary>Why that device cannot be opened; null where it can.</summary>
    public static string? FaultOf(string name)
    {
        try
        {
            TorchBackend.Create(name);
            return null;
        }
        catch (FlexLlmException e)
        {
            return e.Message;
        }
    }
}
