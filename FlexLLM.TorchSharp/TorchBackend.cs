using System.Globalization;
using FlexLLM.Backends;
using FlexLLM.Backends.Torch;
using TorchSharp;

namespace FlexLLM;

/// <summary>How libtorch computes on a device.</summary>
public sealed record TorchOptions
{
    /// <summary>
    /// Whether a GPU may round the operands of F32 products to TF32 (10 bits of mantissa in place of 23) where that is faster. libtorch
    /// has one such switch in a process: the device that was created last sets it.
    /// </summary>
    /// <value>False.</value>
    public bool AllowTf32 { get; init; }

    /// <summary>
    /// Whether keys and values are kept in BF16: rounded to 8 bits of mantissa, to nearest even, they take half the bytes, so that twice
    /// the tokens fit into the same memory. Holds for requests and for the samples of finetuning jobs alike; scores, softmax, sums and
    /// all gradients stay F32, but see <see cref="Bf16Activations"/>. The last bits of libtorch's sums depend on the shape of a batch, and
    /// a key near a tie then rounds the other way: answers change with what runs beside a request more often than in F32.
    /// </summary>
    /// <value>False: F32.</value>
    public bool Bf16KvCache { get; init; }

    /// <summary>
    /// Whether rows of a model's values and of their gradients are kept in BF16: rounded to 8 bits of mantissa, to nearest even, whenever
    /// an operation writes them. They take half the bytes, saved ones of finetuning jobs included, and a GPU multiplies them with BF16
    /// weights as they are. Norms, attention, softmax, losses, logits, adapters, their gradients and optimizers compute in F32. Answers
    /// change with what runs beside a request more often than in F32. <see cref="Bf16KvCache"/> beside it rounds keys and values no more:
    /// they are BF16 when they come there. On a GPU from Ampere on requests then attend in BF16 as well, in libtorch's fused attention:
    /// sums are F32, probabilities are rounded. Windows of finetuning jobs whose gradients pass through attention stay F32.
    /// </summary>
    /// <value>False: F32.</value>
    public bool Bf16Activations { get; init; }
}

/// <summary>Devices that compute on libtorch: the CPU, and NVIDIA GPUs through CUDA.</summary>
public static class TorchBackend
{
    private const string Packages =
        "Add one of these packages to the application: TorchSharp-cuda-linux or TorchSharp-cuda-windows for NVIDIA GPUs, " +
        "TorchSharp-cpu for none.";

    /// <summary>
    /// The device to put in <see cref="CoServingOptions.Device"/>. libtorch is loaded here, so that what is missing shows here too.
    /// </summary>
    /// <param name="device">"cpu", "cuda" (the same as "cuda:0"), or "cuda:N" for the GPU with that number.</param>
    /// <param name="options">How to compute there, or null for the defaults.</param>
    /// <exception cref="ArgumentException">The text names no such device.</exception>
    /// <exception cref="FlexLlmException">
    /// libtorch cannot be loaded, is of another version than TorchSharp, or has no such GPU; the message says what to add or change.
    /// </exception>
    public static ComputeDevice Create(string device, TorchOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(device);
        (DeviceType type, int index) = Parse(device);
        try
        {
            options ??= new TorchOptions();
            TorchDevice opened = Open(type, index, options);
            Apply(options);
            return opened;
        }
        catch (Exception e) when (FaultOf(device, e) is FlexLlmException fault)
        {
            throw fault;
        }
    }

    /// <summary>What a missing or unfit TorchSharp or libtorch means to the application; null for any other fault.</summary>
    internal static FlexLlmException? FaultOf(string device, Exception cause)
    {
        Exception inner = cause.GetBaseException();
        string text = inner.Message.Split('\n')[0].Trim().TrimEnd('.');

        // Both are there, but not of one version: a function or an assembly is not the one that was compiled against.
        bool isUnfit = inner is EntryPointNotFoundException or MissingMemberException or FileLoadException;
        if (isUnfit || inner.GetType() == typeof(TypeLoadException))
        {
            return new FlexLlmException(
                $"Device '{device}' needs another version of TorchSharp or libtorch ({text}). Use TorchSharp 0.105.2 to 0.107.0, and of " +
                "TorchSharp-cpu, TorchSharp-cuda-linux or TorchSharp-cuda-windows exactly the same version.", cause);
        }

        // What the loader throws depends on whether the managed part, the native part, or something that it needs is missing.
        return cause is NotSupportedException or TypeInitializationException or DllNotFoundException or BadImageFormatException
            or FileNotFoundException
            ? new FlexLlmException($"Device '{device}' needs libtorch, which could not be loaded ({text}). {Packages}", cause)
            : null;
    }

    // Both switches exist without a GPU too, where nothing reads them.
    private static void Apply(TorchOptions options)
    {
        torch.backends.cuda.matmul.allow_tf32 = options.AllowTf32;
        torch.backends.cudnn.allow_tf32 = options.AllowTf32;
    }

    private static (DeviceType Type, int Index) Parse(string device)
    {
        if (device is "cpu")
        {
            return (DeviceType.CPU, -1);
        }

        const string cuda = "cuda";
        if (device is cuda)
        {
            return (DeviceType.CUDA, 0);
        }

        bool isNumbered = device.StartsWith(cuda + ":", StringComparison.Ordinal);
        string number = isNumbered ? device[(cuda.Length + 1)..] : "";
        return int.TryParse(number, NumberStyles.None, CultureInfo.InvariantCulture, out int index)
            ? (DeviceType.CUDA, index)
            : throw new ArgumentException(
                $"Unknown device '{device}'. Use \"cpu\", \"cuda\", or \"cuda:N\" for GPU number N.", nameof(device));
    }

    private static TorchDevice Open(DeviceType type, int index, TorchOptions options)
    {
        torch.InitializeDeviceType(DeviceType.CPU);
        if (type == DeviceType.CPU)
        {
            return new TorchDevice(type, index, options);
        }

        if (!torch.cuda.is_available())
        {
            throw new FlexLlmException(
                "libtorch finds no CUDA here. Add the package TorchSharp-cuda-linux or TorchSharp-cuda-windows in place of " +
                "TorchSharp-cpu, and install an NVIDIA driver that is new enough for its CUDA version; or use the device \"cpu\".");
        }

        int count = torch.cuda.device_count();
        return index < count
            ? new TorchDevice(type, index, options)
            : throw new FlexLlmException($"There is no GPU number {index}: this machine has {count}, numbered from 0.");
    }

    private sealed class TorchDevice(DeviceType type, int index, TorchOptions options) : ComputeDevice
    {
        internal override string? Memory => type == DeviceType.CUDA ? $"cuda:{index}" : null;

        internal override IComputeBackend CreateBackend()
        {
            DType kvType = options.Bf16KvCache ? DType.BF16 : DType.F32;
            DType activationType = options.Bf16Activations ? DType.BF16 : DType.F32;
            return type == DeviceType.CUDA
                ? new TorchComputeBackend(
                    new torch.Device(type, index), kvType: kvType, bytesFree: () => CudaDriver.BytesFree(index),
                    gpu: CudaDriver.NameOf(index), multipliesBf16: CudaDriver.MultipliesBf16(index), activationType: activationType)
                : new TorchComputeBackend(new torch.Device(type, index), kvType: kvType, activationType: activationType);
        }
    }
}
