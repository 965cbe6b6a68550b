using System.Text.Json;
using FlexLLM.Formats;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>What the measured finetuning job learns.</summary>
internal static class FinetuningData
{
    // Enough for no sample to come twice in a short run; each costs a few KiB.
    private const int RandomSamples = 64;

    /// <summary>
    /// Samples of a JSONL file, cut to a length: lines with "question" and "answer" (GSM8K), or any form that
    /// <see cref="JsonlDataset"/> takes, whose longer lines are left out. Without a file, samples of exactly that length at random.
    /// </summary>
    /// <exception cref="InvalidFileException">A missing file or a malformed line.</exception>
    /// <exception cref="RequestRejectedException">A file of text for a model without a tokenizer.</exception>
    public static TrainingDataset Load(string? file, Tokenizer? tokenizer, ModelConfig config, int tokensMax, ulong seed)
    {
        if (file is null)
        {
            var random = new SeededRandom(seed);
            return TrainingDataset.FromExamples(
                [.. Enumerable.Range(0, RandomSamples).Select(_ => AllTargets(RandomIds(ref random, config.VocabularySize, tokensMax)))]);
        }

        using JsonlReader reader = JsonlReader.Open(file);
        var examples = new List<TrainingExample>();
        foreach (JsonlLine line in reader.ReadLines())
        {
            if (line.Value.ValueKind != JsonValueKind.Object || !line.Value.TryGetProperty("question", out JsonElement question))
            {
                return JsonlDataset.Open(file);
            }

            if (question.ValueKind != JsonValueKind.String || !line.Value.TryGetProperty("answer", out JsonElement answer) ||
                answer.ValueKind != JsonValueKind.String)
            {
                throw new InvalidFileException(file, $"line {line.Number}", "needs \"question\" and \"answer\" as strings");
            }

            if (tokenizer is null)
            {
                throw new RequestRejectedException($"{file} holds text, and the model has no tokenizer.");
            }

            int[] ids = tokenizer.Encode($"{question.GetString()}\n{answer.GetString()}");
            examples.Add(AllTargets(ids.Length > tokensMax ? ids[..tokensMax] : ids));
        }

        return TrainingDataset.FromExamples(examples);
    }

    /// <summary>Random ids of the vocabulary.</summary>
    public static int[] RandomIds(ref SeededRandom random, int vocabulary, int count)
    {
        int[] ids = new int[count];
        for (int i = 0; i < count; i++)
        {
            ids[i] = random.Next(vocabulary);
        }

        return ids;
    }

    private static TrainingExample AllTargets(int[] ids) => TrainingExample.FromTokens(ids, [.. ids.Select(_ => true)]);
}
