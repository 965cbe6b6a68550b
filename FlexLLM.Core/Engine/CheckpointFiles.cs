using FlexLLM.Execution;
using FlexLLM.Formats;

namespace FlexLLM.Engine;

/// <summary>What a checkpoint folder says beside its weights: tokenizer, chat template, sampling defaults, end tokens.</summary>
internal sealed record CheckpointFiles
{
    public required Tokenizer? Tokenizer { get; init; }

    public required ChatTemplate? ChatTemplate { get; init; }

    public required SamplingDefaults SamplingDefaults { get; init; }

    public required IReadOnlyCollection<int> EosTokens { get; init; }

    /// <summary>Of a model that has no folder: token ids only, greedy.</summary>
    public static CheckpointFiles None(ModelConfig config) => new()
    {
        Tokenizer = null,
        ChatTemplate = null,
        EosTokens = [.. config.EosTokenIds],
        SamplingDefaults = new SamplingDefaults(),
    };

    public static CheckpointFiles Load(string folder, ModelConfig config)
    {
        GenerationDefaults defaults = GenerationDefaults.Load(folder);
        Tokenizer? tokenizer = File.Exists(Path.Combine(folder, "tokenizer.json")) ? Tokenizer.Load(folder) : null;
        if (tokenizer is not null && tokenizer.VocabularySize > config.VocabularySize)
        {
            throw new InvalidFileException(
                Path.Combine(folder, "tokenizer.json"), "vocab",
                $"has ids up to {tokenizer.VocabularySize - 1}; config.json has a vocabulary of {config.VocabularySize}");
        }

        HashSet<int> eos = [.. defaults.EosTokenIds ?? config.EosTokenIds];
        if (tokenizer?.EosId is int end)
        {
            eos.Add(end);
        }

        return new CheckpointFiles
        {
            Tokenizer = tokenizer,
            ChatTemplate = tokenizer is null ? null : UsableTemplate(folder, tokenizer),
            EosTokens = eos,
            SamplingDefaults = new SamplingDefaults
            {
                Temperature = defaults.DoSample == true ? (float)(defaults.Temperature ?? 1) : 0,
                TopK = defaults.TopK ?? TopKDefault(defaults),
                TopP = (float)(defaults.TopP ?? 1),
                MinP = (float)(defaults.MinP ?? 0),
                RepetitionPenalty = (float)(defaults.RepetitionPenalty ?? 1),
            },
        };
    }

    // transformers samples from 50 where the file does not say, and leaves that number out when it saves one.
    private static int TopKDefault(GenerationDefaults defaults) => defaults.DoSample == true ? 50 : 0;

    // A template whose special tokens the tokenizer lacks cannot be used; plain prompts still can.
    private static ChatTemplate? UsableTemplate(string folder, Tokenizer tokenizer)
    {
        ChatTemplate? template = ChatTemplate.Detect(folder);
        try
        {
            template?.Encode(tokenizer, [new ChatMessage("user", "?")], addGenerationPrompt: true);
            return template;
        }
        catch (ArgumentException)
        {
            return null;
        }
    }
}
