using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks;

/// <summary>
/// Bytes that must be read and operations that must be done, whoever does them: what is computed twice, converted or copied is not
/// counted (as the head on every rank of a group), nor is the bypass (a thousandth of a layer). A multiplication and its addition are two
/// operations.
/// </summary>
internal sealed record ModelWork
{
    /// <summary>Weights that one step multiplies rows with: every linear layer, and the head.</summary>
    public required long WeightBytes { get; init; }

    /// <summary>Keys and values of one position in all layers, as they are stored.</summary>
    public required long KvBytesPerPosition { get; init; }

    /// <summary>One row through the linear layers.</summary>
    public required double LinearFlopsPerRow { get; init; }

    /// <summary>One row through the head.</summary>
    public required double HeadFlopsPerRow { get; init; }

    /// <summary>One row that attends one position, in all layers: the score and the sum.</summary>
    public required double AttentionFlopsPerPair { get; init; }

    public static ModelWork Of(LoadedModel model)
    {
        // Each rank has its part of the linear layers, and all of the head.
        int ranks = model.Ranks;
        DeviceWeight head = model.Matrix(model.Program.Logits.Weight);
        ModelConfig config = model.Config;
        DeviceWeight[] linear = [.. model.Program.Body.Where(i => i.Op == OpKind.Linear).Select(i => model.Matrix(i.Weight))];
        return new ModelWork
        {
            WeightBytes = linear.Sum(w => w.Bytes) + (head.Bytes / ranks),
            KvBytesPerPosition = model.Backend.KvCacheBytes(
                config.LayerCount, DeviceKvCache.BlocksPerExtent, config.KeyValueHeads, config.HeadDim)
                / (DeviceKvCache.BlocksPerExtent * DeviceKvCache.TokensPerBlock),
            LinearFlopsPerRow = ranks * linear.Sum(FlopsPerRow),
            HeadFlopsPerRow = FlopsPerRow(head),
            AttentionFlopsPerPair = 4.0 * model.Whole.AttentionHeads * config.HeadDim * config.LayerCount,
        };
    }

    /// <summary>Rows times the positions that each attends: row i of a sequence attends i + 1.</summary>
    public static double Pairs(double rows) => rows * (rows + 1) / 2;

    /// <summary>A prompt up to its first token.</summary>
    public double PrefillFlops(int tokens) =>
        (LinearFlopsPerRow * tokens) + (AttentionFlopsPerPair * Pairs(tokens)) + HeadFlopsPerRow;

    /// <summary>One token of each of some sequences that have so many positions on average.</summary>
    public double DecodeBytes(int sequences, double positions) => WeightBytes + (KvBytesPerPosition * sequences * positions);

    /// <summary>
    /// One sample forward, through the loss, which multiplies with the head forward and backward, and backward as far as the program
    /// goes: a product for each input gradient, and in attention five where forward has two.
    /// </summary>
    public double TrainFlops(int tokens, LoadedModel model, TrainingProgram program)
    {
        Instruction[] backward = [.. program.Layers.SelectMany(layer => layer)];
        double linear = model.Ranks *
            backward.Where(i => i.Op == OpKind.LinearBackwardInput).Sum(i => FlopsPerRow(model.Matrix(i.Weight)));
        double attention = 2.5 * AttentionFlopsPerPair * backward.Count(i => i.Op == OpKind.AttentionBackward) / model.Config.LayerCount;
        return (tokens * (LinearFlopsPerRow + (2 * HeadFlopsPerRow) + linear)) + (Pairs(tokens) * (AttentionFlopsPerPair + attention));
    }

    private static double FlopsPerRow(DeviceWeight weight) => 2.0 * weight.OutFeatures * weight.InFeatures;
}
