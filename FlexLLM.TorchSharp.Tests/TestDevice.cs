using FlexLLM.Backends;

namespace FlexLLM.Tests.Support;

/// <summary>
/// Puts the tests of the engine on libtorch: on the CPU, or on the device that FLEXLLM_TEST_DEVICE names, such as "cuda:0".
/// </summary>
internal static class TestDevice
{
    private static readonly Lazy<string?> Fault = new(() => FaultOf(Name));

    public static bool IsManaged => false;

    public static double Tolerance => 1e-4;

    public static string? Missing => Fault.Value;

    private static string Name => Environment.GetEnvironmentVariable("FLEXLLM_TEST_DEVICE") is { Length: > 0 } name ? name : "cpu";

    // libtorch has threads of its own.
    public static ComputeDevice Of(int threads = 1)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(threads, 1);
        return TorchBackend.Create(Name);
    }

    public static IComputeBackend CreateBackend(int threads = 1) => Of(threads).CreateBackend();

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
