using System.Globalization;
using System.Text;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Models;

namespace FlexLLM.Finetuning;

/// <summary>
/// What a LoRA job needs, computed from its compiled programs alone, in the categories of <see cref="TrainingRun.MemoryByCategory"/>
/// and the workspaces of the passes. A backend may add padding and packed copies; that shows as the difference to the real bytes.
/// </summary>
internal sealed class TrainingMemory
{
    public const string ForwardWorkspace = "forward workspace";
    public const string BackwardWorkspace = "backward workspace";

    private readonly IReadOnlyList<(string Category, long Bytes)> _rows;

    private TrainingMemory(IReadOnlyList<(string Category, long Bytes)> rows) => _rows = rows;

    /// <summary>Bytes of all categories that a job allocates for itself; the forward workspace is the engine's.</summary>
    public long JobBytes => _rows.Where(r => r.Category != ForwardWorkspace).Sum(r => r.Bytes);

    /// <param name="model">The model.</param>
    /// <param name="program">The job's backward program.</param>
    /// <param name="adapter">The adapter.</param>
    /// <param name="moments">Tensors that the optimizer keeps beside each weight: 0, 1 or 2.</param>
    /// <param name="tokens">Longest sample.</param>
    /// <param name="window">Most rows of a window.</param>
    public static TrainingMemory Of(LoadedModel model, TrainingProgram program, PeftAdapter adapter, int moments, int tokens, int window)
    {
        ModelConfig config = model.Config;
        long kvColumns = config.KeyValueHeads * config.HeadDim;
        long blocks = (tokens + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock;
        long parameters = adapter.Tensors().Sum(t => t.Tensor.Spec.Count);
        return new TrainingMemory(
        [
            Floats("saved activations", program.SavedColumns * tokens),
            Floats("keys and values of the sample", 2 * kvColumns * blocks * DeviceKvCache.TokensPerBlock * config.LayerCount),
            Floats("activation gradients", (config.HiddenSize + (2 * kvColumns)) * tokens),
            Floats("adapter weights", parameters),
            Floats("adapter gradients", parameters),
            Floats("optimizer state", moments * parameters),
            Floats(ForwardWorkspace, ((long)model.Program.Arena.Columns * window) + config.VocabularySize),
            Floats(BackwardWorkspace, (long)program.Arena.Columns * window),
        ]);

        static (string Category, long Bytes) Floats(string category, long count) => (category, count * sizeof(float));
    }

    /// <summary>Bytes of a category; null where the programs do not tell.</summary>
    public long? Of(string category)
    {
        foreach ((string name, long bytes) in _rows)
        {
            if (name == category)
            {
                return bytes;
            }
        }

        return null;
    }

    /// <summary>The categories of the job itself, a line each, in MiB.</summary>
    public override string ToString()
    {
        var text = new StringBuilder();
        foreach ((string category, long bytes) in _rows.Where(r => r.Category != ForwardWorkspace))
        {
            text.Append(CultureInfo.InvariantCulture, $"\n  {category,-32}{bytes / 1048576.0,10:F1} MiB");
        }

        return text.Append(CultureInfo.InvariantCulture, $"\n  {"together",-32}{JobBytes / 1048576.0,10:F1} MiB").ToString();
    }
}
