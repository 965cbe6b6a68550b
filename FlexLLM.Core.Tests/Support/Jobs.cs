using System.Numerics.Tensors;
using System.Runtime.InteropServices;
using FlexLLM.Primitives;
using NUnit.Framework;
using NUnit.Framework.Constraints;

namespace FlexLLM.Tests.Support;

/// <summary>Small finetuning jobs and what is left of them.</summary>
internal static class Jobs
{
    // Another order of the samples is off by a few tenths.
    private const double ErrorMax = 1e-2;

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

    /// <summary>
    /// That weights are those that were expected: the same file where the device promises bits, else the same shapes and values, off by
    /// no more than sums in another order are.
    /// </summary>
    public static Constraint SameAs(byte[] expected) =>
        TestDevice.IsManaged ? Is.EqualTo(expected) : new PredicateConstraint<byte[]>(actual => Error(actual, expected) < ErrorMax);

    /// <summary>Root of the mean square of the differences, relative to that of the expected values; infinite for other shapes.</summary>
    public static double Error(byte[] actual, byte[] expected)
    {
        int header = sizeof(long) + (int)BitConverter.ToInt64(expected);
        if (actual.Length != expected.Length || !actual.AsSpan(0, header).SequenceEqual(expected.AsSpan(0, header)))
        {
            return double.PositiveInfinity;
        }

        ReadOnlySpan<float> values = MemoryMarshal.Cast<byte, float>(actual.AsSpan(header));
        ReadOnlySpan<float> wanted = MemoryMarshal.Cast<byte, float>(expected.AsSpan(header));
        return TensorPrimitives.Distance(values, wanted) / TensorPrimitives.Norm(wanted);
    }

    /// <summary>Runs a job to its end.</summary>
    public static async Task<FinetuningProgress> TrainAsync(this CoServingEngine engine, FinetuningRequest request)
    {
        FinetuningJob job = await engine.StartFinetuningAsync(request).Soon();
        return await job.Completion.Soon();
    }
}
