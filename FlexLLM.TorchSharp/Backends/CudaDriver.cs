using System.Runtime.InteropServices;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// What TorchSharp's managed API does not tell about a GPU, how much of its memory is free, which one it is and what it can, and does
/// not do for it: pin host memory. The driver's own library does, and where CUDA runs it is there under one name, whatever package
/// brought libtorch.
/// </summary>
internal static unsafe class CudaDriver
{
    private const int Success = 0;
    private const int NameBytesMax = 256; // Its end, a zero, included.
    private const uint ForAllContexts = 1; // CU_MEMHOSTREGISTER_PORTABLE
    private const int CapabilityMajor = 75; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    private const int CapabilityWithBf16 = 8;

    private static string Library => OperatingSystem.IsWindows() ? "nvcuda.dll" : "libcuda.so.1";

    /// <summary>
    /// Bytes that are free on a GPU now, those of other processes not counted. Numbers are the driver's, which hides the same GPUs
    /// from libtorch (CUDA_VISIBLE_DEVICES).
    /// </summary>
    /// <exception cref="FlexLlmException">It cannot be told; the message names the option to set instead.</exception>
    public static long BytesFree(int gpu)
    {
        return Functions() is Func<string, nint> find
            ? BytesFree(gpu, find)
            : throw Unknown(gpu, $"the NVIDIA driver's {Library} is not there");
    }

    /// <summary>The model of a GPU, such as "NVIDIA H100 80GB HBM3"; null where the driver does not tell.</summary>
    public static string? NameOf(int gpu) => Functions() is Func<string, nint> find ? NameOf(gpu, find) : null;

    /// <inheritdoc cref="BytesFree(int, Func{string, nint})"/>
    public static string? NameOf(int gpu, Func<string, nint> find)
    {
        var nameOf = (delegate* unmanaged<byte*, int, int, int>)find("cuDeviceGetName");
        byte* name = stackalloc byte[NameBytesMax];
        return nameOf != null && DeviceOf(gpu, find) is int device && nameOf(name, NameBytesMax, device) == Success
            ? Marshal.PtrToStringUTF8((nint)name)
            : null;
    }

    /// <summary>Whether a GPU multiplies BF16 in hardware, as those from Ampere on do; true where the driver does not tell.</summary>
    public static bool MultipliesBf16(int gpu) => Functions() is not Func<string, nint> find || MultipliesBf16(gpu, find);

    /// <inheritdoc cref="BytesFree(int, Func{string, nint})"/>
    public static bool MultipliesBf16(int gpu, Func<string, nint> find)
    {
        var attributeOf = (delegate* unmanaged<int*, int, int, int>)find("cuDeviceGetAttribute");
        int major;
        return attributeOf == null || DeviceOf(gpu, find) is not int device || attributeOf(&major, CapabilityMajor, device) != Success
            || major >= CapabilityWithBf16;
    }

    /// <param name="gpu">Number of the GPU.</param>
    /// <param name="find">Address of a function of the driver; 0 where it has none of that name.</param>
    public static long BytesFree(int gpu, Func<string, nint> find)
    {
        nuint[] freeAndTotal = new nuint[2];
        string? fault = InContext(gpu, find, "cuMemGetInfo_v2", memoryOf =>
        {
            fixed (nuint* free = freeAndTotal)
            {
                return ((delegate* unmanaged<nuint*, nuint*, int>)memoryOf)(free, free + 1);
            }
        });
        return fault is null ? (long)freeAndTotal[0] : throw Unknown(gpu, fault);
    }

    /// <summary>
    /// Pins host memory, so that a GPU reads it while host and stream go on; null where the driver does not, and copies from there are
    /// then merely slower. To be disposed before the memory is freed. The primary context, which the pinning would end with, is held
    /// meanwhile: libtorch may not have made it yet.
    /// </summary>
    public static IDisposable? Pin(int gpu, nint address, long bytes) =>
        Functions() is Func<string, nint> find ? Pin(gpu, address, bytes, find) : null;

    /// <inheritdoc cref="Pin(int, nint, long)"/>
    public static IDisposable? Pin(int gpu, nint address, long bytes, Func<string, nint> find)
    {
        string? fault = InContext(
            gpu, find, "cuMemHostRegister_v2",
            register => ((delegate* unmanaged<nint, nuint, uint, int>)register)(address, (nuint)bytes, ForAllContexts), Hold.Taken);
        return fault is null ? new Pinned(gpu, address, find) : null;
    }

    // The driver's own number of a GPU; null where it does not tell.
    private static int? DeviceOf(int gpu, Func<string, nint> find)
    {
        var initialize = (delegate* unmanaged<uint, int>)find("cuInit");
        var deviceOf = (delegate* unmanaged<int*, int, int>)find("cuDeviceGet");
        int device = 0;
        bool isKnown = initialize != null && deviceOf != null && initialize(0) == Success && deviceOf(&device, gpu) == Success;
        return isKnown ? device : null;
    }

    // Makes a call in the primary context, which libtorch computes in and which is left as it was found, but for a hold on it that is
    // taken, where the call succeeds, or given back. Tells what went wrong.
    private static string? InContext(int gpu, Func<string, nint> find, string name, Func<nint, int> call, Hold hold = Hold.None)
    {
        string[] names =
        [
            "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2", "cuCtxPushCurrent_v2",
            "cuCtxPopCurrent_v2", name,
        ];
        nint[] functions = [.. names.Select(find)];
        if (Array.IndexOf(functions, 0) is int missing and >= 0)
        {
            return $"the NVIDIA driver has no {names[missing]}";
        }

        var initialize = (delegate* unmanaged<uint, int>)functions[0];
        var deviceOf = (delegate* unmanaged<int*, int, int>)functions[1];
        var retain = (delegate* unmanaged<nint*, int, int>)functions[2];
        var release = (delegate* unmanaged<int, int>)functions[3];
        var push = (delegate* unmanaged<nint, int>)functions[4];
        var pop = (delegate* unmanaged<nint*, int>)functions[5];
        int device = 0;
        nint context = 0;
        string? fault = Fault(initialize(0), names[0]) ?? Fault(deviceOf(&device, gpu), names[1])
            ?? Fault(retain(&context, device), names[2]);
        if (fault is not null)
        {
            return fault;
        }

        fault = Fault(push(context), names[4]);
        if (fault is null)
        {
            fault = Fault(call(functions[6]), name);
            string? unpopped = Fault(pop(&context), names[5]);

            // What was taken is taken, whoever the thread's context is.
            fault ??= hold == Hold.Taken ? null : unpopped;
        }

        for (int releases = hold == Hold.GivenBack ? 2 : hold == Hold.Taken && fault is null ? 0 : 1; releases > 0; releases--)
        {
            _ = release(device);
        }

        return fault;
    }

    private static string? Fault(int status, string call) =>
        status == Success ? null : $"{call} of the NVIDIA driver answers error {status}";

    private static Func<string, nint>? Functions() => NativeLibrary.TryLoad(Library, out nint handle)
        ? name => NativeLibrary.TryGetExport(handle, name, out nint address) ? address : 0
        : null;

    private static FlexLlmException Unknown(int gpu, string cause) => new(
        $"How much memory is free on cuda:{gpu} cannot be told: {cause}. Set CoServingOptions.DeviceBytesMax.");

    private sealed class Pinned(int gpu, nint address, Func<string, nint> find) : IDisposable
    {
        public void Dispose() => _ = InContext(
            gpu, find, "cuMemHostUnregister", unregister => ((delegate* unmanaged<nint, int>)unregister)(address),
            Hold.GivenBack);
    }

    private enum Hold
    {
        None,
        Taken,
        GivenBack,
    }
}
