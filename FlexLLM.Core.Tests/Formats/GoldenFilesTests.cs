using FlexLLM.Formats;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Formats;

[TestFixture]
internal sealed class GoldenFilesTests
{
    [Test]
    public void Checkpoint_HasTheShapesOfItsConfig(
        [Values("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-llama-bf16", "tiny-qwen2-bf16", "tiny-qwen3-bf16")] string model)
    {
        string folder = SharedData.Require("golden", model);
        ModelConfig config = ModelConfig.Load(folder);
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(folder);
        DType type = model.EndsWith("bf16", StringComparison.Ordinal) ? DType.BF16 : DType.F32;
        var expected = new Dictionary<string, (int Rows, int Columns)>();
        int hidden = config.HiddenSize;
        int queries = config.AttentionHeads * config.HeadDim;
        int keys = config.KeyValueHeads * config.HeadDim;
        expected["model.embed_tokens.weight"] = (config.VocabularySize, hidden);
        expected["model.norm.weight"] = (1, hidden);
        if (!config.TieWordEmbeddings)
        {
            expected["lm_head.weight"] = (config.VocabularySize, hidden);
        }

        for (int layer = 0; layer < config.LayerCount; layer++)
        {
            string prefix = $"model.layers.{layer}.";
            expected[prefix + "input_layernorm.weight"] = expected[prefix + "post_attention_layernorm.weight"] = (1, hidden);
            expected[prefix + "mlp.gate_proj.weight"] = (config.IntermediateSize, hidden);
            expected[prefix + "mlp.up_proj.weight"] = (config.IntermediateSize, hidden);
            expected[prefix + "mlp.down_proj.weight"] = (hidden, config.IntermediateSize);
            expected[prefix + "self_attn.q_proj.weight"] = (queries, hidden);
            expected[prefix + "self_attn.k_proj.weight"] = expected[prefix + "self_attn.v_proj.weight"] = (keys, hidden);
            expected[prefix + "self_attn.o_proj.weight"] = (hidden, queries);
            if (config.QkvBias)
            {
                expected[prefix + "self_attn.q_proj.bias"] = (1, queries);
                expected[prefix + "self_attn.k_proj.bias"] = expected[prefix + "self_attn.v_proj.bias"] = (1, keys);
            }

            if (config.QkNorm)
            {
                expected[prefix + "self_attn.q_norm.weight"] = expected[prefix + "self_attn.k_norm.weight"] = (1, config.HeadDim);
            }
        }

        Assert.That(checkpoint.Names, Is.EquivalentTo(expected.Keys));
        foreach ((string name, (int rows, int columns)) in expected)
        {
            HostMatrix matrix = checkpoint.Get(name).AsMatrix();
            Assert.That((matrix.Type, matrix.Rows, matrix.Columns), Is.EqualTo((type, rows, columns)), name);
        }
    }

    [Test]
    public void Checkpoint_Bf16_IsTheRoundedF32([Values("tiny-llama", "tiny-qwen2", "tiny-qwen3")] string model)
    {
        using SafetensorsCheckpoint full = SafetensorsCheckpoint.Open(SharedData.Require("golden", model));
        using SafetensorsCheckpoint half = SafetensorsCheckpoint.Open(SharedData.Require("golden", model + "-bf16"));
        foreach (string name in full.Names)
        {
            float[] rounded = Array.ConvertAll(full.Get(name).ToFloats(), RoundToBf16);
            Assert.That(half.Get(name).ToFloats().AsSpan().SequenceEqual(rounded), name);
        }
    }

    [Test]
    public void Golden_IdsAndSums_AreInRange([Values("tiny-llama", "tiny-qwen2", "tiny-qwen3")] string model)
    {
        using SafetensorsFile golden = SafetensorsFile.Open(SharedData.Require("golden", model, "golden.safetensors"));
        Assert.That(golden.Get("ids.33").ToInt64s(), Has.Length.EqualTo(33).And.All.InRange(0, 511));
        Assert.That(golden.Get("logits.33").Shape, Is.EqualTo([33L, 512]));
        double[] sums = golden.Get("logits_sum.120").ToDoubles();
        Assert.That(sums, Has.Length.EqualTo(1).And.All.Matches<double>(double.IsFinite));
    }

    [Test]
    public void Adapter_HasTheRankOfItsConfig()
    {
        string folder = SharedData.Require("golden", "tiny-llama", "adapter-all");
        AdapterConfig config = AdapterConfig.Load(folder);
        Assert.That((config.Rank, config.Scale, config.TargetModules.Count), Is.EqualTo((8, 2.0, 7)));
        using SafetensorsFile weights = SafetensorsFile.Open(Path.Combine(folder, "adapter_model.safetensors"));
        HostMatrix a = weights.Get("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight").AsMatrix();
        HostMatrix b = weights.Get("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight").AsMatrix();
        Assert.That((a.Rows, a.Columns, b.Rows, b.Columns), Is.EqualTo((8, 160, 64, 8)));
        Assert.That(weights.Tensors, Has.Count.EqualTo(4 * 7 * 2));
    }

    private static float RoundToBf16(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return BitConverter.UInt32BitsToSingle((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000);
    }
}
