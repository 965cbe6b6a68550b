using System.Runtime.InteropServices;

namespace FlexLLM.Backends.Torch;

/// <summary>libtorch tells a full device from other faults by its text alone.</summary>
internal static class MemoryFault
{
    // CUDA's allocator and driver, the host's allocator on Linux and on Windows, cuBLAS.
    private static readonly string[] Texts =
        ["out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED"];

    public static bool Is(Exception fault) => fault is OutOfMemoryException ||
        (fault is ExternalException && Texts.Any(text => fault.Message.Contains(text, StringComparison.Ordinal)));
}
