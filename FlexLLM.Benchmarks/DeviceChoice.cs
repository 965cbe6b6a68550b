using System.Globalization;

namespace FlexLLM.Benchmarks;

/// <summary>What --backend, --device, --kv and --activations ask for; nothing is opened yet.</summary>
/// <param name="IsTorch">libtorch instead of the managed backend.</param>
/// <param name="Name">"cpu", "cuda" or "cuda:N"; several of them, such as "cuda:0,cuda:1", are the ranks of a group.</param>
/// <param name="Bf16Kv">Keys and values in BF16 instead of F32.</param>
/// <param name="Bf16Activations">Activations in BF16 instead of F32.</param>
internal sealed record DeviceChoice(bool IsTorch, string Name, bool Bf16Kv = false, bool Bf16Activations = false)
{
    private const string Numbered = "cuda:";

    public const string Usage = "[--backend cpu|torch] [--device cpu|cuda|cuda:N[,...]] [--kv f32|bf16] [--activations f32|bf16]";

    /// <summary>The managed backend.</summary>
    public static readonly DeviceChoice Cpu = new(false, "cpu");

    /// <summary>Names of the options.</summary>
    public static readonly string[] Options = ["--backend", "--device", "--kv", "--activations"];

    /// <summary>Whether the device has memory of its own and much of everything.</summary>
    public bool IsCuda => !Ranks.Contains("cpu");

    /// <summary>Names of the devices of a group; one where there is none.</summary>
    public string[] Ranks => Name.Split(',');

    /// <summary>Number of the GPU, of a group the first one's.</summary>
    public int CudaIndex => Number(Ranks[0]) ?? 0;

    /// <exception cref="ArgumentException">No such backend or device, or a device that the backend cannot use.</exception>
    public static DeviceChoice Parse(string[] args)
    {
        bool isTorch = CommandLine.Text(args, "--backend") switch
        {
            null or "cpu" => false,
            "torch" => true,
            string other => throw new ArgumentException($"--backend: '{other}' is neither cpu (managed) nor torch (libtorch)."),
        };
        string device = CommandLine.Text(args, "--device") ?? "cpu";
        string[] ranks = device.Split(',');
        if (Array.Find(ranks, rank => !IsKnown(rank)) is string unknown)
        {
            throw new ArgumentException($"--device: '{unknown}' is none of cpu, cuda and cuda:N.");
        }

        return isTorch || ranks.All(rank => rank == "cpu")
            ? new DeviceChoice(isTorch, device, IsBf16(args, "--kv", isTorch), IsBf16(args, "--activations", isTorch))
            : throw new ArgumentException($"--device {device} needs --backend torch: the managed backend computes on the CPU alone.");
    }

    private static bool IsBf16(string[] args, string option, bool isTorch) => CommandLine.Text(args, option) switch
    {
        null or "f32" => false,
        "bf16" => isTorch ? true : throw new ArgumentException($"{option} bf16 needs --backend torch: the managed backend keeps F32."),
        string other => throw new ArgumentException($"{option}: '{other}' is neither f32 nor bf16."),
    };

    private static bool IsKnown(string device) => device is "cpu" or "cuda" || Number(device) is not null;

    private static int? Number(string device) => device.StartsWith(Numbered, StringComparison.Ordinal) &&
        int.TryParse(device[Numbered.Length..], NumberStyles.None, CultureInfo.InvariantCulture, out int number) ? number : null;
}
