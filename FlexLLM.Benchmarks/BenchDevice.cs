using System.Reflection;

namespace FlexLLM.Benchmarks;

/// <summary>Opens the device that was asked for.</summary>
internal static class BenchDevice
{
    /// <summary>What to do where this program was built without TorchSharp.</summary>
    public const string HowToBuild =
        "--backend torch: this program was built against the signatures of TorchSharp alone, which hold no code. Build it with " +
        "-p:UseTorchSharpPackage=true and the libtorch of this machine, -p:LibtorchPackage=TorchSharp-cuda-linux, " +
        "TorchSharp-cuda-windows or TorchSharp-cpu; or with -p:TorchSharpAssembly=FILE for a TorchSharp.dll that was built elsewhere.";

    /// <param name="choice">The device.</param>
    /// <param name="threads">Threads of the managed backend, which the ranks of a group share; libtorch decides for itself.</param>
    /// <exception cref="FlexLlmException">No TorchSharp, no libtorch, or no such GPU; the message says what to do.</exception>
    public static ComputeDevice Create(DeviceChoice choice, int threads) => ComputeDevice.Group(
        [.. choice.Ranks.Select(rank => Create(choice, rank, Math.Max(1, threads / choice.Ranks.Length)))]);

    /// <summary>Whether there is a TorchSharp with code in it.</summary>
    public static bool HasTorchSharp()
    {
        try
        {
            return !Assembly.Load("TorchSharp").GetCustomAttributes<AssemblyMetadataAttribute>().Any(a => a.Key == "FlexLLM.Contract");
        }
        catch (FileNotFoundException)
        {
            return false;
        }
    }

    private static ComputeDevice Create(DeviceChoice choice, string rank, int threads) =>
        !choice.IsTorch ? ComputeDevice.Cpu(threads)
        : HasTorchSharp() ? TorchBackend.Create(rank, new TorchOptions
        {
            Bf16KvCache = choice.Bf16Kv,
            Bf16Activations = choice.Bf16Activations,
        })
        : throw new FlexLlmException(HowToBuild);
}
