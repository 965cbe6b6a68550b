namespace FlexLLM.Benchmarks;

/// <summary>Entry point: the first argument names the verb. Exit code 0 is success, 2 wrong usage or bad input.</summary>
internal static class Program
{
    private static readonly (string Name, string Usage, Func<string[], int> Run)[] Verbs =
    [
        ("verify", "DIR [--threads N]", VerifyVerb.Run),
        ("make-model", MakeModelVerb.Usage, MakeModelVerb.Run),
        ("infer", InferVerb.Usage, InferVerb.Run),
        ("train", TrainVerb.Usage, TrainVerb.Run),
        ("serve", ServeVerb.Usage, ServeVerb.Run),
        ("roofline", RooflineVerb.Usage, RooflineVerb.Run),
        ("summary", SummaryVerb.Usage, SummaryVerb.Run),
        ("plan", PlanVerb.Usage, PlanVerb.Run),
        ("simulate", SimulateVerb.Usage, SimulateVerb.Run),
        ("tokenize", TokenizeVerb.Usage, TokenizeVerb.Run),
        ("latency", LatencyVerb.Usage, LatencyVerb.Run),
        ("kernels", KernelBenchmarks.Usage, KernelBenchmarks.Run),
    ];

    private static int Main(string[] args)
    {
        int verb = args.Length == 0 ? -1 : Array.FindIndex(Verbs, v => v.Name == args[0]);
        if (verb < 0)
        {
            Console.Error.WriteLine("Verbs:");
            foreach ((string name, string usage, _) in Verbs)
            {
                Console.Error.WriteLine($"  {name} {usage}");
            }

            return 2;
        }

        try
        {
            return Verbs[verb].Run(args[1..]);
        }
        catch (Exception e) when (e is ArgumentException or FlexLlmException or IOException or UnauthorizedAccessException)
        {
            Console.Error.WriteLine(e.Message);
            return 2;
        }
    }
}
