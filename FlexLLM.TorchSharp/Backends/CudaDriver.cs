using System.Runtime.InteropServices;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// What TorchSharp's managed API does not tell about a GPU: how much of its memory is free, and which one it is. The driver's own
/// library knows, and where CUDA runs it is there under one name, whatever package brought libtorch.
/// </summary>
internal static unsafe class CudaDriver
{
    private const int Success = 0;
    private const int NameBytesMax = 256; // Its end, a zero, included.

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
        var initialize = (delegate* unmanaged<uint, int>)find("cuInit");
        var deviceOf = (delegate* unmanaged<int*, int, int>)find("cuDeviceGet");
        var nameOf = (delegate* unmanaged<byte*, int, int, int>)find("cuDeviceGetName");
        int device;
        byte* name = stackalloc byte[NameBytesMax];
        bool isKnown = initialize != null && deviceOf != null && nameOf != null && initialize(0) == Success &&
            deviceOf(&device, gpu) == Success && nameOf(name, NameBytesMax, device) == Success;
        return isKnown ? Marshal.PtrToStringUTF8((nint)name) : null;
    }

    /// <param name="gpu">Number of the GPU.</param>
    /// <param name="find">Address of a function of the driver; 0 where it has none of that name.</param>
    public static long BytesFree(int gpu, Func<string, nint> find)
    {
        // Calls go through the primary context, which libtorch computes in; it is left as it was found.
        var initialize = (delegate* unmanaged<uint, int>)Find("cuInit");
        var deviceOf = (delegate* unmanaged<int*, int, int>)Find("cuDeviceGet");
        var retain = (delegate* unmanaged<nint*, int, int>)Find("cuDevicePrimaryCtxRetain");
        var release = (delegate* unmanaged<int, int>)Find("cuDevicePrimaryCtxRelease_v2");
        var push = (delegate* unmanaged<nint, int>)Find("cuCtxPushCurrent_v2");
        var pop = (delegate* unmanaged<nint*, int>)Find("cuCtxPopCurrent_v2");
        var memory = (delegate* unmanaged<nuint*, nuint*, int>)Find("cuMemGetInfo_v2");
        int device;
        nint context;
        Check(initialize(0), "cuInit");
        Check(deviceOf(&device, gpu), "cuDeviceGet");
        Check(retain(&context, device), "cuDevicePrimaryCtxRetain");
        try
        {
            Check(push(context), "cuCtxPushCurrent");
            nuint free, total;
            int status = memory(&free, &total);
            Check(pop(&context), "cuCtxPopCurrent");
            Check(status, "cuMemGetInfo");
            return (long)free;
        }
        finally
        {
            _ = release(device);
        }

        nint Find(string name) => find(name) is nint address and not 0
            ? address
            : throw Unknown(gpu, $"the NVIDIA driver has no {name}");

        void Check(int status, string call)
        {
            if (status != Success)
            {
                throw Unknown(gpu, $"{call} of the NVIDIA driver answers error {status}");
            }
        }
    }

    private static Func<string, nint>? Functions() => NativeLibrary.TryLoad(Library, out nint handle)
        ? name => NativeLibrary.TryGetExport(handle, name, out nint address) ? address : 0
        : null;

    private static FlexLlmException Unknown(int gpu, string cause) => new(
        $"How much memory is free on cuda:{gpu} cannot be told: {cause}. Set CoServingOptions.DeviceBytesMax.");
}
