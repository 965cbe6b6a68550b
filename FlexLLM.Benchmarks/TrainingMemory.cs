using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks;

/// <summary>
/// What a LoRA job needs, computed from its compiled programs alone, in the categories of TrainingRun.MemoryByCategory and the
/// workspaces of the passes. A backend may add padding and packed copies; that shows as the difference to the real bytes.
/// </summary>
internal sealed class TrainingMemory
{
    public const string ForwardWorkspace = "forward workspace";
    public const string BackwardWorkspace = "backward workspace";

    private readonly Dictionary<string, long> _bytes;

    private TrainingMemory(Dictionary<string, long> bytes) => _bytes = bytes;

    public static TrainingMemory Of(LoadedModel model, TrainingProgram program, int rank, int tokens, int window)
    {
        ModelConfig config = model.Config;
        long kvColumns = config.KeyValueHeads * config.HeadDim;
        long blocks = (tokens + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock;
        long parameters = rank * program.Sites.Sum(site =>
        {
            (int inFeatures, int outFeatures) = AdapterSites.WidthsOf(AdapterSites.ModuleOf(site), config);
            return (long)inFeatures + outFeatures;
        });
        var floats = new Dictionary<string, long>
        {
            ["saved activations"] = program.SavedColumns * tokens,
            ["keys and values of the sample"] = 2 * kvColumns * blocks * DeviceKvCache.TokensPerBlock * config.LayerCount,
            ["activation gradients"] = (config.HiddenSize + (2 * kvColumns)) * tokens,
            ["adapter weights"] = parameters,
            ["adapter gradients"] = parameters,
            ["optimizer state"] = 2 * parameters,
            [ForwardWorkspace] = (model.Program.SlotColumns.Sum(c => (long)c) * window) + config.VocabularySize,
            [BackwardWorkspace] = program.SlotColumns.Sum(c => (long)c) * window,
        };
        return new TrainingMemory(floats.ToDictionary(f => f.Key, f => f.Value * sizeof(float)));
    }

    /// <summary>Bytes of a category; null where the programs do not tell.</summary>
    public long? Of(string category) => _bytes.TryGetValue(category, out long bytes) ? bytes : null;
}
