using FlexLLM.Backends.Cpu;
using FlexLLM.Formats;
using FlexLLM.Models;
using FlexLLM.Tests.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Models;

[TestFixture]
internal sealed class RandomCheckpointTests
{
    private TempFolder _folder = null!;

    [SetUp]
    public void SetUp() => _folder = new TempFolder();

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [Test]
    public void Write_EveryArchitecture_Loads(
        [Values] ModelArchitecture architecture, [Values(DType.F32, DType.BF16)] DType type, [Values] bool tied)
    {
        ModelConfig config = Small(architecture) with { TieWordEmbeddings = tied };
        RandomCheckpoint.Write(_folder.Path, config, type, seed: 7);
        ModelConfig read = ModelConfig.Load(_folder.Path);
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder.Path);
        using var backend = new CpuBackend(1);
        using LoadedModel model = LoadedModel.Load(checkpoint, read, backend, null, positionsMax: 16);
        Assert.Multiple(() =>
        {
            Assert.That(checkpoint.Contains("lm_head.weight"), Is.EqualTo(!tied));
            Assert.That(checkpoint.Contains("model.layers.1.self_attn.k_norm.weight"), Is.EqualTo(config.QkNorm));
            Assert.That(checkpoint.Contains("model.layers.1.self_attn.k_proj.bias"), Is.EqualTo(config.QkvBias));
            Assert.That(read.TorchDtype, Is.EqualTo(type));
            Assert.That(GenerationDefaults.Load(_folder.Path).EosTokenIds, Is.EqualTo(new[] { 3, 5 }));
        });
    }

    [Test]
    public void Write_BiasesEverywhere_Loads()
    {
        ModelConfig config = Small(ModelArchitecture.Llama) with { AttentionBias = true, MlpBias = true };
        RandomCheckpoint.Write(_folder.Path, config, DType.F32, 1);
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder.Path);
        using var backend = new CpuBackend(1);
        using LoadedModel model = LoadedModel.Load(checkpoint, ModelConfig.Load(_folder.Path), backend, null, positionsMax: 16);
        Assert.That(checkpoint.Contains("model.layers.0.mlp.down_proj.bias"));
    }

    [Test]
    public void Write_SameSeed_SameBytes()
    {
        byte[] first = Bytes("a", seed: 11);
        Assert.That(Bytes("b", seed: 11), Is.EqualTo(first));
        Assert.That(Bytes("c", seed: 12), Is.Not.EqualTo(first));
    }

    [Test]
    public void Write_Sharded_HoldsWhatTheSingleFileHolds()
    {
        ModelConfig config = Small(ModelArchitecture.Qwen2);
        RandomCheckpoint.Write(_folder["single"], config, DType.BF16, 5);
        RandomCheckpoint.Write(_folder["shards"], config, DType.BF16, 5, shardBytesMax: 6000);
        using SafetensorsCheckpoint single = SafetensorsCheckpoint.Open(_folder["single"]);
        using SafetensorsCheckpoint shards = SafetensorsCheckpoint.Open(_folder["shards"]);
        Assert.That(File.Exists(Path.Combine(_folder["shards"], SafetensorsCheckpoint.IndexFileName)));
        Assert.That(shards.Names, Is.EquivalentTo(single.Names));
        foreach (string name in single.Names)
        {
            Assert.That(shards.Get(name).ToFloats(), Is.EqualTo(single.Get(name).ToFloats()), name);
        }
    }

    [Test]
    public void Write_Weights_AreNormalAndGainsAreOne()
    {
        ModelConfig config = Small(ModelArchitecture.Llama) with { VocabularySize = 1000 };
        RandomCheckpoint.Write(_folder.Path, config, DType.F32, 3);
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder.Path);
        float[] table = checkpoint.Get("model.embed_tokens.weight").ToFloats();
        float[] gate = checkpoint.Get("model.layers.0.mlp.gate_proj.weight").ToFloats();
        double mean = table.Average(v => (double)v);
        double deviation = Math.Sqrt(table.Average(v => (v - mean) * (v - mean)));
        double beyondTwo = table.Count(v => Math.Abs(v - mean) > 2 * deviation) / (double)table.Length;
        Assert.Multiple(() =>
        {
            Assert.That(table, Has.Length.GreaterThan(30_000).And.Length.GreaterThan(1 << 14), "more than one chunk");
            Assert.That(mean, Is.Zero.Within(0.0005));
            Assert.That(deviation, Is.EqualTo(0.02).Within(0.0005));
            Assert.That(beyondTwo, Is.EqualTo(0.0455).Within(0.006), "4.55 % of a normal distribution");
            Assert.That(table.Distinct().Count(), Is.GreaterThan(20_000));
            Assert.That(checkpoint.Get("model.norm.weight").ToFloats(), Is.All.EqualTo(1f));
            Assert.That(checkpoint.Get("model.layers.0.mlp.up_proj.weight").ToFloats(), Is.Not.EqualTo(gate));
        });
    }

    [Test]
    public void Write_Tiny_HasATokenizerThatKnowsItsEosTokens()
    {
        ModelConfig config = ModelShapes.Of("tiny");
        RandomCheckpoint.Write(_folder.Path, config, DType.F32, 1);
        Tokenizer tokenizer = Tokenizer.Load(_folder.Path);
        Assert.That(tokenizer.Decode(tokenizer.Encode("Grüße")), Is.EqualTo("Grüße"));
        Assert.That(config.EosTokenIds, Is.EqualTo(new[] { tokenizer.IdOf("<|endoftext|>"), tokenizer.IdOf("<|im_end|>") }));
    }

    [Test]
    public void Write_F16_IsRefused() =>
        Assert.That(
            () => RandomCheckpoint.Write(_folder.Path, Small(ModelArchitecture.Llama), DType.F16, 1), Throws.ArgumentException);

    [Test]
    public void Shape_Unknown_IsRefusedWithTheList() => Assert.That(
        () => ModelShapes.Of("gpt-2"),
        Throws.ArgumentException.With.Message.Contains("'gpt-2'").And.Message.Contains("qwen2.5-0.5b"));

    // The published sizes of these models, embedding counted once.
    [TestCase("smollm2-135m", 134_515_008)]
    [TestCase("qwen2.5-0.5b", 494_032_768)]
    [TestCase("qwen3-0.6b", 596_049_920)]
    [TestCase("llama-3.2-1b", 1_235_814_400)]
    [TestCase("llama-3.1-8b", 8_030_261_248)]
    [TestCase("qwen2.5-14b", 14_770_033_664)]
    [TestCase("qwen2.5-32b", 32_763_876_352)]
    [TestCase("llama-3.1-70b", 70_553_706_496)]
    public void Shape_OfPublishedModel_HasItsParameterCount(string name, long parameters) =>
        Assert.That(DecoderWeights.Of(ModelShapes.Of(name)).Sum(shape => shape.Count), Is.EqualTo(parameters));

    private byte[] Bytes(string name, ulong seed)
    {
        RandomCheckpoint.Write(_folder[name], Small(ModelArchitecture.Qwen3), DType.BF16, seed);
        return File.ReadAllBytes(Path.Combine(_folder[name], SafetensorsCheckpoint.SingleFileName));
    }

    private static ModelConfig Small(ModelArchitecture architecture) => new()
    {
        Architecture = architecture,
        HiddenSize = 36,
        IntermediateSize = 52,
        LayerCount = 2,
        AttentionHeads = 4,
        KeyValueHeads = 2,
        HeadDim = 10,
        VocabularySize = 77,
        MaxPositions = 64,
        EosTokenIds = [3, 5],
    };
}
