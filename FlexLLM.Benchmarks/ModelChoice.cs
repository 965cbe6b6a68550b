using FlexLLM.Models;

namespace FlexLLM.Benchmarks;

/// <summary>What --model or --shape ask for: a folder, or random weights of a named shape that are made on the device.</summary>
/// <param name="Source">Path of the folder, or name of the shape.</param>
/// <param name="IsShape">Which of the two it is.</param>
internal sealed record ModelChoice(string Source, bool IsShape)
{
    public const string Usage = "--model DIR | --shape NAME";

    /// <summary>Names of the options.</summary>
    public static readonly string[] Options = ["--model", "--shape"];

    /// <summary>For reports.</summary>
    public string Name => IsShape ? $"{Source} (random)" : Path.GetFileName(Path.TrimEndingDirectorySeparator(Source));

    /// <exception cref="ArgumentException">None or both are given, or no such shape is known.</exception>
    public static ModelChoice Parse(string[] args)
    {
        (string? folder, string? shape) = (CommandLine.Text(args, "--model"), CommandLine.Text(args, "--shape"));
        if (shape is null)
        {
            return new ModelChoice(folder ?? throw new ArgumentException("--model or --shape is missing."), IsShape: false);
        }

        _ = ModelShapes.Of(shape);
        return folder is null
            ? new ModelChoice(shape, IsShape: true)
            : throw new ArgumentException("--model and --shape exclude each other.");
    }

    /// <summary>Shape of the model.</summary>
    public ModelConfig Config() => IsShape ? ModelShapes.Of(Source) : ModelConfig.Load(Source);

    /// <summary>Host memory with the weights of a shape, BF16 where nothing else is asked for; null where they are in a file.</summary>
    public RandomWeights? Weights(DType? type)
    {
        if (!IsShape)
        {
            return null;
        }

        Console.Error.WriteLine($"making random weights: {Source}");
        return new RandomWeights(Config(), type ?? DType.BF16, seed: 1);
    }
    /// <summary>Starts an engine on it.</summary>
    /// <param name="random">What <see cref="Weights"/> gave.</param>
    /// <param name="options">Of the engine.</param>
    public Task<CoServingEngine> StartAsync(RandomWeights? random, CoServingOptions options) =>
        random is null ? CoServingEngine.LoadAsync(Source, options) : CoServingEngine.LoadRandomAsync(random, options);
}
