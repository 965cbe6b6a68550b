using System.Diagnostics;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks;

/// <summary>`make-model`: a HuggingFace model folder of a named shape with random weights.</summary>
internal static class MakeModelVerb
{
    public static string Usage { get; } =
        $"--shape NAME --out DIR [--dtype f32|bf16] [--seed N]   (shapes: {string.Join(", ", ModelShapes.Names)})";

    public static int Run(string[] args)
    {
        CommandLine.Allow(args, "--shape", "--dtype", "--out", "--seed");
        ModelConfig config = ModelShapes.Of(CommandLine.Require(args, "--shape"));
        string folder = CommandLine.Require(args, "--out");
        DType type = CommandLine.WeightType(args, "--dtype") ?? DType.BF16;
        int seed = CommandLine.Int(args, "--seed", 1, min: 0);
        var watch = Stopwatch.StartNew();
        RandomCheckpoint.Write(folder, config, type, (ulong)seed);
        long parameters = DecoderWeights.Of(config).Sum(shape => shape.Count);
        Console.WriteLine($"{folder}: {parameters:N0} parameters as {type}, seed {seed}, in {watch.Elapsed.TotalSeconds:0.0} s");
        return 0;
    }
}
