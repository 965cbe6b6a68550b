using System.Runtime.InteropServices;
using System.Text;
using FlexLLM.Formats;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Tokenization;

namespace FlexLLM;

/// <summary>
/// Writes HuggingFace model folders with random weights, for tests, samples and benchmarks. The bytes depend on the arguments
/// alone: every tensor has a random stream of its own, so shards hold what the single file would.
/// </summary>
public static class RandomCheckpoint
{
    /// <summary>transformers' default initializer_range.</summary>
    public const float DeviationDefault = 0.02f;

    private const int ValuesPerChunk = 1 << 14;

    // Bytes and special tokens.
    private static readonly int TokenizerSize = 256 + TokenizerWriter.SpecialTokens.Length;

    /// <summary>
    /// Writes config.json, generation_config.json and the weights into a folder, which is made where it does not exist. Norm
    /// gains are 1, everything else (biases too) is about normal. Needs memory for one chunk, not for a tensor. A vocabulary of
    /// at least 259 tokens gets a byte-level tokenizer with the ChatML template too; ids beyond it stay unused.
    /// </summary>
    /// <param name="folder">Folder to write to; a checkpoint in it is replaced.</param>
    /// <param name="config">Shape of the model.</param>
    /// <param name="type">F32 or BF16.</param>
    /// <param name="seed">Seed of all weights.</param>
    /// <param name="deviation">Standard deviation of the weights.</param>
    /// <param name="vocabularyText">Text to learn the tokenizer's merges from, as many as the vocabulary has room for.</param>
    /// <param name="shardBytesMax">Splits the weights into files of at most that many bytes.</param>
    /// <exception cref="ArgumentException">The type is F16, or a number is out of its range.</exception>
    /// <exception cref="IOException">The folder holds shards where one file would be written, or the other way round.</exception>
    public static void Write(
        string folder, ModelConfig config, DType type, ulong seed, float deviation = DeviationDefault, string? vocabularyText = null,
        long shardBytesMax = long.MaxValue)
    {
        ArgumentException.ThrowIfNullOrEmpty(folder);
        ArgumentNullException.ThrowIfNull(config);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(deviation);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(shardBytesMax);
        if (type is not (DType.F32 or DType.BF16))
        {
            throw new ArgumentException($"Random checkpoints are written as F32 or BF16, not {type}.", nameof(type));
        }

        Directory.CreateDirectory(folder);
        SafetensorsWriter.WriteSharded(
            folder, DecoderWeights.Of(config).Select(shape => Tensor(shape, type, seed, deviation)), shardBytesMax);
        (config with { TorchDtype = type }).Save(folder);
        WriteGenerationConfig(Path.Combine(folder, GenerationDefaults.FileName), config);
        int room = config.VocabularySize - TokenizerSize;
        if (room >= 0)
        {
            TokenizerWriter.Write(folder, vocabularyText is null ? [] : TokenizerWriter.LearnMerges(vocabularyText, room));
        }
    }

    /// <summary>Whether the weight is the gain of a norm, which random models have at 1.</summary>
    internal static bool IsGain(WeightShape shape) => shape.IsVector && shape.Name.EndsWith("norm.weight", StringComparison.Ordinal);

    private static void WriteGenerationConfig(string path, ModelConfig config) => AtomicFile.WriteJson(path, json =>
    {
        json.WriteStartObject();
        if (config.BosTokenId is int bos)
        {
            json.WriteNumber("bos_token_id", bos);
        }

        json.WriteStartArray("eos_token_id");
        foreach (int eos in config.EosTokenIds)
        {
            json.WriteNumberValue(eos);
        }

        json.WriteEndArray();
        json.WriteEndObject();
    });

    private static TensorToWrite Tensor(WeightShape shape, DType type, ulong seed, float deviation)
    {
        bool isGain = IsGain(shape);
        StoredType stored = type == DType.F32 ? StoredType.F32 : StoredType.BF16;
        return new TensorToWrite(shape.Name, stored, shape.Dimensions, stream =>
        {
            var random = new SeededRandom(seed ^ StableHash.Of(Encoding.UTF8.GetBytes(shape.Name)));
            float[] values = new float[(int)Math.Min(shape.Count, ValuesPerChunk)];
            ushort[] narrow = new ushort[type == DType.BF16 ? values.Length : 0];
            Array.Fill(values, 1f);
            for (long left = shape.Count; left > 0;)
            {
                Span<float> chunk = values.AsSpan(0, (int)Math.Min(left, values.Length));
                if (!isGain)
                {
                    FillNormal(chunk, deviation, ref random);
                }

                left -= chunk.Length;
                stream.Write(type == DType.F32 ? MemoryMarshal.AsBytes(chunk) : Narrow(chunk, narrow));
            }
        });
    }

    // The sum of the four 16-bit parts of one random number: close to normal, within 3.5 deviations, and free of the logarithms
    // that would make half a billion values take ten times longer.
    internal static void FillNormal(Span<float> values, float deviation, ref SeededRandom random)
    {
        const float Mean = 2f * 0xFFFF;
        float scale = deviation / 37837.22f; // Deviation of the sum: sqrt(4 (2^32 - 1) / 12).
        for (int i = 0; i < values.Length; i++)
        {
            ulong bits = random.NextUInt64();
            int sum = (int)(bits & 0xFFFF) + (int)((bits >> 16) & 0xFFFF) + (int)((bits >> 32) & 0xFFFF) + (int)(bits >> 48);
            values[i] = (sum - Mean) * scale;
        }
    }

    // To nearest even; the values are finite.
    internal static ReadOnlySpan<byte> Narrow(ReadOnlySpan<float> values, ushort[] narrow)
    {
        for (int i = 0; i < values.Length; i++)
        {
            uint bits = BitConverter.SingleToUInt32Bits(values[i]);
            narrow[i] = (ushort)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
        }

        return MemoryMarshal.AsBytes(narrow.AsSpan(0, values.Length));
    }
}
