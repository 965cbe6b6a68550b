namespace FlexLLM.Benchmarks;

/// <summary>Entry point: picks the verb named by the first argument.</summary>
internal static class Program
{
    private static int Main(string[] args)
    {
        try
        {
            return args switch
            {
                ["verify", .. string[] rest] => VerifyVerb.Run(rest),
                _ => Usage(),
            };
        }
        catch (Exception e) when (e is ArgumentException or FlexLlmException)
        {
            Console.Error.WriteLine(e.Message);
            return 2;
        }
    }

    private static int Usage()
    {
        Console.Error.WriteLine("Verbs: verify DIR");
        return 2;
    }
}
