using FlexLLM.Primitives;

namespace FlexLLM.Tests.Support;

/// <summary>Small finetuning jobs and what is left of them.</summary>
internal static class Jobs
{
    /// <summary>Samples of these lengths; about half of the tokens carry loss.</summary>
    public static TrainingDataset Dataset(ulong seed, params int[] lengths)
    {
        var random = new SeededRandom(seed);
        var examples = new List<TrainingExample>();
        foreach (int length in lengths)
        {
            int[] ids = TinyModel.Ids(length, random.NextUInt64());
            bool[] loss = [.. ids.Select((_, i) => i == length - 1 || random.Next(2) == 0)];
            examples.Add(TrainingExample.FromTokens(ids, loss));
        }

        return TrainingDataset.FromExamples(examples);
    }

    /// <summary>Seven samples of ragged lengths, groups of three, two shuffled epochs: six optimizer steps.</summary>
    public static FinetuningRequest Request(string adapter, ulong seed = 1) => new()
    {
        Adapter = adapter,
        Dataset = Dataset(seed, 5, 23, 2, 40, 17, 9, 31),
        Method = new LoraConfig { Rank = 4, Alpha = 8, TargetModules = ["q_proj", "v_proj", "down_proj"] },
        Epochs = 2,
        GradientAccumulation = 3,
        ShuffleSeed = 11,
        InitializationSeed = seed,
        Optimizer = new AdamWOptions { LearningRate = 1e-2f, WeightDecay = 0.01f },
    };

    /// <summary>The weights of an adapter's newest version as a PEFT file holds them.</summary>
    public static async Task<byte[]> WeightsAsync(CoServingEngine engine, string adapter, string folder)
    {
        await engine.Adapters.SaveAsync(adapter, folder).Soon();
        return await File.ReadAllBytesAsync(Path.Combine(folder, "adapter_model.safetensors"));
    }

    /// <summary>Runs a job to its end.</summary>
    public static async Task<FinetuningProgress> TrainAsync(this CoServingEngine engine, FinetuningRequest request)
    {
        FinetuningJob job = await engine.StartFinetuningAsync(request).Soon();
        return await job.Completion.Soon();
    }
}
