using System.Text.Json;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>What tokens cost at least, to tell how busy a run kept the device.</summary>
/// <param name="Best">What the device does at best.</param>
/// <param name="Weights">Type of the weights.</param>
/// <param name="WeightBytes">Weights that a step reads.</param>
/// <param name="FlopsPerPromptToken">Linear layers.</param>
/// <param name="FlopsPerGeneratedToken">Linear layers and head.</param>
/// <param name="FlopsPerTrainedToken">Forward, loss and backward of a token of a sample.</param>
internal sealed record ServingCosts(
    Roofline Best, DType Weights, long WeightBytes, double FlopsPerPromptToken, double FlopsPerGeneratedToken,
    double FlopsPerTrainedToken)
{
    /// <summary>The time of a decode step that reads the weights at copy bandwidth and does nothing else, in seconds.</summary>
    public double DecodeSecondsMin => WeightBytes / Best.CopyBytesPerSecond;

    /// <summary>
    /// Share of the matrix rate that all tokens of the window took: prompts, answers, and finetuning tokens, whose backward pass is taken
    /// to be done as often as their forward pass. The attention of requests is not counted.
    /// </summary>
    public double ShareOfMatrix(ServingRun run) => Best.ShareOfMatrix(
        (FlopsPerPromptToken * run.Series.Sum(p => p.PromptTokens)) + (FlopsPerGeneratedToken * run.TokensGenerated) +
            (FlopsPerTrainedToken * run.TokensTrained),
        run.Seconds, Weights);

    /// <summary>Share of the copy bandwidth that reading the weights once a step took.</summary>
    public double ShareOfCopy(ServingRun run) => Best.ShareOfCopy((double)WeightBytes * run.Steps, run.Seconds);

    public void Write(TextWriter output, IReadOnlyList<ServingRun> runs)
    {
        output.WriteLine($"device at best: {Best.Describe()}");
        output.WriteLine($"{"load",-11}{"mode",-17}{"% of matrix rate",18}{"% of copy bandwidth (weights once a step)",43}");
        foreach (ServingRun run in runs)
        {
            output.WriteLine($"{run.Load,-11}{run.Mode,-17}{(100 * ShareOfMatrix(run)).Fixed(1),18}{(100 * ShareOfCopy(run)).Fixed(1),43}");
        }
    }

    public void Write(Utf8JsonWriter json)
    {
        Best.Write(json);
        json.WriteNumber("weight_bytes_per_step", WeightBytes);
        json.WriteNumber("decode_seconds_min", DecodeSecondsMin);
        json.WriteNumber("flops_per_prompt_token", FlopsPerPromptToken);
        json.WriteNumber("flops_per_generated_token", FlopsPerGeneratedToken);
        json.WriteNumber("flops_per_trained_token", FlopsPerTrainedToken);
    }
}
