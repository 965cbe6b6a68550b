using System.Text;
using FlexLLM.Formats;

namespace FlexLLM;

/// <summary>The decoder families that this library builds.</summary>
public enum ModelArchitecture
{
    /// <summary>LlamaForCausalLM.</summary>
    Llama,

    /// <summary>Qwen2ForCausalLM (Qwen2 and Qwen2.5): biases on q, k and v.</summary>
    Qwen2,

    /// <summary>Qwen3ForCausalLM: RMS norms over each head of q and k.</summary>
    Qwen3,
}

/// <summary>
/// Shape and constants of a model, from a HuggingFace config.json. Equality compares <see cref="EosTokenIds"/> by reference.
/// </summary>
public sealed record ModelConfig
{
    /// <summary>Name of the file inside a model folder.</summary>
    internal const string FileName = "config.json";

    /// <summary>The decoder family.</summary>
    public required ModelArchitecture Architecture { get; init; }

    /// <summary>Width of the residual stream.</summary>
    public required int HiddenSize { get; init; }

    /// <summary>Width of the MLP between its projections.</summary>
    public required int IntermediateSize { get; init; }

    /// <summary>Decoder layers.</summary>
    public required int LayerCount { get; init; }

    /// <summary>Query heads of a layer.</summary>
    public required int AttentionHeads { get; init; }

    /// <summary>Key and value heads of a layer; divides <see cref="AttentionHeads"/>.</summary>
    public required int KeyValueHeads { get; init; }

    /// <summary>Width of one head, even. Heads times this need not equal the hidden size.</summary>
    public required int HeadDim { get; init; }

    /// <summary>Rows of the embedding and of the head.</summary>
    public required int VocabularySize { get; init; }

    /// <summary>Longest sequence, in tokens.</summary>
    public required int MaxPositions { get; init; }

    /// <summary>Added to the mean square inside each RMS norm.</summary>
    public double RmsNormEpsilon { get; init; } = 1e-6;

    /// <summary>Base of the rotary frequencies.</summary>
    public double RopeTheta { get; init; } = 10000;

    /// <summary>Rotary scaling, or null for none.</summary>
    public RopeScaling? RopeScaling { get; init; }

    /// <summary>The head is the embedding matrix; the checkpoint has no lm_head.weight.</summary>
    public bool TieWordEmbeddings { get; init; }

    /// <summary>"attention_bias" of Llama and Qwen3: biases on q, k, v and o. Qwen2 has a fixed rule instead.</summary>
    public bool AttentionBias { get; init; }

    /// <summary>"mlp_bias" of Llama: biases on gate, up and down.</summary>
    public bool MlpBias { get; init; }

    /// <summary>Id of the begin-of-sequence token, if any. Not checked against the vocabulary.</summary>
    public int? BosTokenId { get; init; }

    /// <summary>Ids that end a generation; may be empty. Not checked against the vocabulary.</summary>
    public IReadOnlyList<int> EosTokenIds { get; init; } = [];

    /// <summary>Element type that the checkpoint was saved in, where the config says.</summary>
    public DType? TorchDtype { get; init; }

    /// <summary>The q, k and v projections have biases.</summary>
    public bool QkvBias => Architecture == ModelArchitecture.Qwen2 || AttentionBias;

    /// <summary>The o projection has a bias.</summary>
    public bool OutputBias => Architecture != ModelArchitecture.Qwen2 && AttentionBias;

    /// <summary>Each head of q and k goes through an RMS norm before the rotary embedding.</summary>
    public bool QkNorm => Architecture == ModelArchitecture.Qwen3;

    /// <summary>Reads the config.json of a model folder, or the given file.</summary>
    /// <param name="folderOrFile">A folder that holds config.json, or the path of such a file.</param>
    /// <exception cref="InvalidFileException">The file is missing or malformed, or the model is not supported.</exception>
    public static ModelConfig Load(string folderOrFile)
    {
        string path = Directory.Exists(folderOrFile) ? Path.Combine(folderOrFile, FileName) : folderOrFile;
        return ModelConfigJson.Read(JsonFile.Load(path), path);
    }

    /// <summary>Parses the text of a config.json.</summary>
    /// <param name="json">UTF-8 text.</param>
    /// <param name="fileNameForErrors">Name that errors carry.</param>
    /// <exception cref="InvalidFileException">The text is malformed, or the model is not supported.</exception>
    public static ModelConfig Parse(ReadOnlySpan<byte> json, string fileNameForErrors) =>
        ModelConfigJson.Read(JsonFile.Parse(json, fileNameForErrors, "JSON"), fileNameForErrors);

    /// <summary>The text of a config.json that this library and HuggingFace transformers read back as this model.</summary>
    /// <exception cref="InvalidOperationException"><see cref="MlpBias"/> is set on a family without it.</exception>
    public string ToJson()
    {
        using var stream = new MemoryStream();
        AtomicFile.WriteJson(stream, json => ModelConfigJson.Write(json, this));
        return Encoding.UTF8.GetString(stream.GetBuffer(), 0, (int)stream.Length);
    }

    /// <summary>Writes config.json into a folder, replacing one that is there.</summary>
    /// <param name="folder">An existing folder.</param>
    /// <exception cref="InvalidOperationException"><see cref="MlpBias"/> is set on a family without it.</exception>
    public void Save(string folder) =>
        AtomicFile.WriteJson(Path.Combine(folder, FileName), json => ModelConfigJson.Write(json, this));

    /// <summary>
    /// Rotary inverse frequencies in radians per position, scaling applied: HeadDim / 2 values, computed in double.
    /// The i-th rotates the pair (i, i + HeadDim / 2) of a head.
    /// </summary>
    internal double[] InverseFrequencies()
    {
        var frequencies = new double[HeadDim / 2];
        for (int i = 0; i < frequencies.Length; i++)
        {
            double frequency = 1 / Math.Pow(RopeTheta, 2.0 * i / HeadDim);
            frequencies[i] = RopeScaling?.Apply(frequency) ?? frequency;
        }

        return frequencies;
    }
}
