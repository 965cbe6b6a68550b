using System.Text.Json;

namespace FlexLLM.Formats;

/// <summary>
/// What generation_config.json of a model folder suggests for sampling. Null means that the file does not say; keys that this
/// library does not use are ignored.
/// </summary>
internal sealed record GenerationDefaults
{
    public const string FileName = "generation_config.json";

    /// <summary>Ids that end a generation.</summary>
    public IReadOnlyList<int>? EosTokenIds { get; init; }

    public int? BosTokenId { get; init; }

    public int? PadTokenId { get; init; }

    /// <summary>Sample (true) or take the likeliest token (false).</summary>
    public bool? DoSample { get; init; }

    public double? Temperature { get; init; }

    /// <summary>Likeliest tokens to sample from; 0 is all.</summary>
    public int? TopK { get; init; }

    public double? TopP { get; init; }

    public double? MinP { get; init; }

    public double? RepetitionPenalty { get; init; }

    /// <summary>Most tokens to generate.</summary>
    public int? MaxNewTokens { get; init; }

    /// <summary>Most tokens of prompt and answer together.</summary>
    public int? MaxLength { get; init; }

    /// <summary>Reads the file of a model folder; a folder without it has no defaults.</summary>
    /// <exception cref="InvalidFileException">A field has the wrong type or lies out of range.</exception>
    public static GenerationDefaults Load(string folder)
    {
        string path = Path.Combine(folder, FileName);
        return File.Exists(path) ? Read(JsonFile.Load(path), path) : new GenerationDefaults();
    }

    /// <summary>Parses the text of such a file.</summary>
    public static GenerationDefaults Parse(ReadOnlySpan<byte> json, string fileNameForErrors) =>
        Read(JsonFile.Parse(json, fileNameForErrors, "JSON"), fileNameForErrors);

    private static GenerationDefaults Read(JsonElement root, string file)
    {
        var json = new JsonFields(root, file);
        int? pad = json.OptionalInt32("pad_token_id", -1, int.MaxValue); // Early LLaMA files write -1 for none.
        return new GenerationDefaults
        {
            EosTokenIds = json.OptionalTokenIds("eos_token_id"),
            BosTokenId = json.OptionalInt32("bos_token_id", 0, int.MaxValue),
            PadTokenId = pad < 0 ? null : pad,
            DoSample = json.OptionalBool("do_sample"),
            Temperature = json.OptionalDouble("temperature", 0, 1e6),
            TopK = json.OptionalInt32("top_k", 0, int.MaxValue),
            TopP = json.OptionalDouble("top_p", 0, 1),
            MinP = json.OptionalDouble("min_p", 0, 1),
            RepetitionPenalty = json.OptionalDouble("repetition_penalty", 1e-6, 1e6),
            MaxNewTokens = json.OptionalInt32("max_new_tokens", 1, int.MaxValue),
            MaxLength = json.OptionalInt32("max_length", 1, int.MaxValue),
        };
    }
}
