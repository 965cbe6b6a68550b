namespace FlexLLM.Models;

/// <summary>Shapes of published models by name, for random checkpoints and simulations.</summary>
internal static class ModelShapes
{
    // Ends of text and of turn in the byte-level tokenizer without merges that random checkpoints get.
    private static readonly int[] EosTokenIds = [256, 258];

    // What the models of a family have in common; the widths are those of its smallest.
    private static readonly ModelConfig Llama31 = new()
    {
        Architecture = ModelArchitecture.Llama,
        HiddenSize = 4096,
        IntermediateSize = 14336,
        LayerCount = 32,
        AttentionHeads = 32,
        KeyValueHeads = 8,
        HeadDim = 128,
        VocabularySize = 128256,
        MaxPositions = 131072,
        RmsNormEpsilon = 1e-5,
        RopeTheta = 500000,
        RopeScaling = new RopeScaling
        {
            Kind = RopeScalingKind.Llama3,
            Factor = 8,
            LowFrequencyFactor = 1,
            HighFrequencyFactor = 4,
            OriginalMaxPositions = 8192,
        },
        EosTokenIds = EosTokenIds,
    };

    private static readonly ModelConfig Qwen25 = new()
    {
        Architecture = ModelArchitecture.Qwen2,
        HiddenSize = 5120,
        IntermediateSize = 13824,
        LayerCount = 48,
        AttentionHeads = 40,
        KeyValueHeads = 8,
        HeadDim = 128,
        VocabularySize = 152064,
        MaxPositions = 131072,
        RmsNormEpsilon = 1e-5,
        RopeTheta = 1e6,
        EosTokenIds = EosTokenIds,
    };

    private static readonly (string Name, ModelConfig Config)[] Table =
    [
        ("tiny", new ModelConfig
        {
            Architecture = ModelArchitecture.Llama,
            HiddenSize = 64,
            IntermediateSize = 160,
            LayerCount = 4,
            AttentionHeads = 4,
            KeyValueHeads = 2,
            HeadDim = 16,
            VocabularySize = 512,
            MaxPositions = 2048,
            TieWordEmbeddings = true,
            EosTokenIds = EosTokenIds,
        }),
        ("smollm2-135m", new ModelConfig
        {
            Architecture = ModelArchitecture.Llama,
            HiddenSize = 576,
            IntermediateSize = 1536,
            LayerCount = 30,
            AttentionHeads = 9,
            KeyValueHeads = 3,
            HeadDim = 64,
            VocabularySize = 49152,
            MaxPositions = 8192,
            RmsNormEpsilon = 1e-5,
            RopeTheta = 100000,
            TieWordEmbeddings = true,
            EosTokenIds = EosTokenIds,
        }),
        ("qwen2.5-0.5b", new ModelConfig
        {
            Architecture = ModelArchitecture.Qwen2,
            HiddenSize = 896,
            IntermediateSize = 4864,
            LayerCount = 24,
            AttentionHeads = 14,
            KeyValueHeads = 2,
            HeadDim = 64,
            VocabularySize = 151936,
            MaxPositions = 32768,
            RopeTheta = 1e6,
            TieWordEmbeddings = true,
            EosTokenIds = EosTokenIds,
        }),
        ("qwen3-0.6b", new ModelConfig
        {
            Architecture = ModelArchitecture.Qwen3,
            HiddenSize = 1024,
            IntermediateSize = 3072,
            LayerCount = 28,
            AttentionHeads = 16,
            KeyValueHeads = 8,
            HeadDim = 128,
            VocabularySize = 151936,
            MaxPositions = 40960,
            RopeTheta = 1e6,
            TieWordEmbeddings = true,
            EosTokenIds = EosTokenIds,
        }),
        ("llama-3.2-1b", new ModelConfig
        {
            Architecture = ModelArchitecture.Llama,
            HiddenSize = 2048,
            IntermediateSize = 8192,
            LayerCount = 16,
            AttentionHeads = 32,
            KeyValueHeads = 8,
            HeadDim = 64,
            VocabularySize = 128256,
            MaxPositions = 131072,
            RmsNormEpsilon = 1e-5,
            RopeTheta = 500000,
            RopeScaling = new RopeScaling
            {
                Kind = RopeScalingKind.Llama3,
                Factor = 32,
                LowFrequencyFactor = 1,
                HighFrequencyFactor = 4,
                OriginalMaxPositions = 8192,
            },
            TieWordEmbeddings = true,
            EosTokenIds = EosTokenIds,
        }),
        ("llama-3.1-8b", Llama31 with
        {
            HiddenSize = 4096,
            IntermediateSize = 14336,
            LayerCount = 32,
            AttentionHeads = 32,
        }),
        ("qwen2.5-14b", Qwen25 with
        {
            HiddenSize = 5120,
            IntermediateSize = 13824,
            LayerCount = 48,
            AttentionHeads = 40,
        }),
        ("qwen2.5-32b", Qwen25 with
        {
            HiddenSize = 5120,
            IntermediateSize = 27648,
            LayerCount = 64,
            AttentionHeads = 40,
        }),
        ("llama-3.1-70b", Llama31 with
        {
            HiddenSize = 8192,
            IntermediateSize = 28672,
            LayerCount = 80,
            AttentionHeads = 64,
        }),

        // What the paper's ablation takes for a model of 70 billion weights: an MLP of four times the hidden width.
        ("llama-70b-4h", Llama31 with
        {
            HiddenSize = 8192,
            IntermediateSize = 32768,
            LayerCount = 80,
            AttentionHeads = 64,
        }),
    ];

    /// <summary>All names, smallest model first.</summary>
    public static IEnumerable<string> Names => Table.Select(row => row.Name);

    /// <summary>The shape of that name.</summary>
    /// <exception cref="ArgumentException">There is none; the message lists the names.</exception>
    public static ModelConfig Of(string name)
    {
        int index = Array.FindIndex(Table, row => row.Name == name);
        return index >= 0
            ? Table[index].Config
            : throw new ArgumentException($"'{name}' is no known model shape; known are {string.Join(", ", Names)}.");
    }
}
