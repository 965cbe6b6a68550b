namespace FlexLLM.Graph.Parallelization;

/// <summary>Machines by name, from their data sheets: dense arithmetic, one direction of the links between the ranks.</summary>
internal static class MachineModels
{
    private static readonly (string Name, MachineModel Machine)[] Table =
    [
        // A100 SXM 80 GB with NVLink 3, H100 SXM with NVLink 4: arithmetic in bfloat16.
        ("a100", Of(312e12, 2.0e12, 10e-6, 300e9, 80e9)),
        ("h100", Of(989e12, 3.35e12, 10e-6, 450e9, 80e9)),

        // A socket with 32 cores of AVX2 and eight channels; ranks share its memory. Arithmetic in F32.
        ("cpu", Of(2e12, 200e9, 20e-6, 50e9, 64e9)),
    ];

    public static IEnumerable<string> Names => Table.Select(row => row.Name);

    /// <summary>The machine of that name.</summary>
    /// <param name="name">One of <see cref="Names"/>.</param>
    /// <param name="bytesPerElement">Width of weights and activations.</param>
    /// <exception cref="ArgumentException">There is none; the message lists the names.</exception>
    public static MachineModel Of(string name, int bytesPerElement)
    {
        int index = Array.FindIndex(Table, row => row.Name == name);
        return index >= 0
            ? Table[index].Machine with { BytesPerElement = bytesPerElement }
            : throw new ArgumentException($"'{name}' is no known machine; known are {string.Join(", ", Names)}.");
    }

    private static MachineModel Of(double flops, double memory, double latency, double link, double bytes) => new()
    {
        FlopsPerSecond = flops,
        MemoryBytesPerSecond = memory,
        LinkLatencySeconds = latency,
        LinkBytesPerSecond = link,
        MemoryBytes = bytes,
        BytesPerElement = 2,
    };
}
