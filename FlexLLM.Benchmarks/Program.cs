namespace FlexLLM.Benchmarks;

/// <summary>Entry point: picks the verb named by the first argument.</summary>
internal static class Program
{
    private static int Main(string[] args)
    {
        Console.Error.WriteLine($"Unknown verb '{(args.Length > 0 ? args[0] : string.Empty)}'.");
        return 2;
    }
}
