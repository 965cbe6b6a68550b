namespace FlexLLM.Tests;

/// <summary>A random checkpoint of a few kilobytes a layer, and a job on it.</summary>
internal static class TinyCheckpoint
{
    /// <summary>Returns the folder, which the caller deletes.</summary>
    public static string Write(int layers)
    {
        string folder = Directory.CreateTempSubdirectory("flexllm-torch-").FullName;
        var config = new ModelConfig
        {
            Architecture = ModelArchitecture.Qwen2,
            HiddenSize = 32,
            IntermediateSize = 48,
            LayerCount = layers,
            AttentionHeads = 4,
            KeyValueHeads = 2,
            HeadDim = 8,
            VocabularySize = 64,
            MaxPositions = 128,
        };
        RandomCheckpoint.Write(folder, config, DType.BF16, seed: 3);
        return folder;
    }

    public static FinetuningRequest Job(string adapter) => new()
    {
        Adapter = adapter,
        Dataset = TrainingDataset.FromExamples(
            [.. Enumerable.Range(0, 6).Select(i => TrainingExample.FromTokens(
                [.. Enumerable.Range(0, 20 + i).Select(t => (t * (i + 3)) % 64)], [.. Enumerable.Repeat(true, 20 + i)]))]),
        Method = new LoraConfig { Rank = 4, Alpha = 8, TargetModules = ["q_proj", "v_proj", "down_proj"] },
        Epochs = 4,
        GradientAccumulation = 2,
        InitializationSeed = 1,
        Optimizer = new AdamWOptions { LearningRate = 1e-2f },
    };
}
