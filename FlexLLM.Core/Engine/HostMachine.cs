using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;

namespace FlexLLM.Engine;

/// <summary>Names the kind of machine that this process runs on, so that measured times are not taken for another's.</summary>
internal static class HostMachine
{
    private const string ProcessorFile = "/proc/cpuinfo";

    // Of them, x86 has the first three and Arm the others; what changes while a machine runs, such as its clock rate, is none of them.
    private static readonly string[] Fields = ["model name", "cpu family", "model", "CPU implementer", "CPU part"];

    /// <summary>Architecture, processors, width of vectors, and which processors, as far as the system tells.</summary>
    public static string Name { get; } =
        $"{RuntimeInformation.ProcessArchitecture}x{Environment.ProcessorCount} vector={VectorBits} {Processor}";

    private static int VectorBits => Vector512.IsHardwareAccelerated ? 512 : Vector256.IsHardwareAccelerated ? 256 : 128;

    private static string Processor => Environment.GetEnvironmentVariable("PROCESSOR_IDENTIFIER") ?? ReadProcessor(ProcessorFile);

    /// <summary>The processors of a file like /proc/cpuinfo, each kind once; "unknown" where there is none.</summary>
    public static string ReadProcessor(string file)
    {
        try
        {
            IEnumerable<string> said = File.ReadLines(file)
                .Select(line => line.Split(':', 2, StringSplitOptions.TrimEntries))
                .Where(pair => pair.Length == 2 && Fields.Contains(pair[0]))
                .Select(pair => $"{pair[0]}={pair[1]}");
            string all = string.Join(' ', said.Distinct());
            return all.Length > 0 ? all : "unknown";
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return "unknown";
        }
    }
}
