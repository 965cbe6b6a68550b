using System.Text;
using System.Text.Json.Nodes;
using FlexLLM.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Formats;

[TestFixture]
internal sealed class ModelConfigTests
{
    internal const string Llama = """
        {"architectures":["LlamaForCausalLM"],"hidden_size":64,"intermediate_size":160,"num_hidden_layers":4,
         "num_attention_heads":4,"num_key_value_heads":2,"vocab_size":512,"max_position_embeddings":2048,"rms_norm_eps":1e-05,
         "rope_theta":500000.0,"bos_token_id":1,"eos_token_id":[2,3],"hidden_act":"silu","torch_dtype":"bfloat16",
         "rope_scaling":{"factor":8.0,"high_freq_factor":4.0,"low_freq_factor":1.0,"original_max_position_embeddings":1000,
         "rope_type":"llama3"},"use_cache":true}
        """;

    [Test]
    public void Parse_Llama_ReadsEveryField()
    {
        ModelConfig config = Parse(Llama);
        Assert.Multiple(() =>
        {
            Assert.That(config.Architecture, Is.EqualTo(ModelArchitecture.Llama));
            Assert.That((config.HiddenSize, config.IntermediateSize, config.LayerCount), Is.EqualTo((64, 160, 4)));
            Assert.That((config.AttentionHeads, config.KeyValueHeads, config.HeadDim), Is.EqualTo((4, 2, 16)));
            Assert.That((config.VocabularySize, config.MaxPositions), Is.EqualTo((512, 2048)));
            Assert.That((config.RmsNormEpsilon, config.RopeTheta), Is.EqualTo((1e-5, 500000.0)));
            Assert.That(config.RopeScaling, Is.EqualTo(new RopeScaling
            {
                Kind = RopeScalingKind.Llama3,
                Factor = 8,
                LowFrequencyFactor = 1,
                HighFrequencyFactor = 4,
                OriginalMaxPositions = 1000,
            }));
            Assert.That((config.TieWordEmbeddings, config.QkvBias, config.OutputBias, config.MlpBias, config.QkNorm),
                Is.EqualTo((false, false, false, false, false)));
            Assert.That(config.BosTokenId, Is.EqualTo(1));
            Assert.That(config.EosTokenIds, Is.EqualTo([2, 3]));
            Assert.That(config.TorchDtype, Is.EqualTo(DType.BF16));
        });
    }

    [TestCase("LlamaForCausalLM", false, false, false)]
    [TestCase("LlamaForCausalLM", true, true, true)]
    [TestCase("Qwen2ForCausalLM", false, true, false)]
    [TestCase("Qwen2ForCausalLM", true, true, false)]
    [TestCase("Qwen3ForCausalLM", false, false, false)]
    [TestCase("Qwen3ForCausalLM", true, true, true)]
    public void Biases_FollowTheArchitecture(string architecture, bool attentionBias, bool qkv, bool output)
    {
        ModelConfig config = Edit(json =>
        {
            json["architectures"] = new JsonArray(architecture);
            json["attention_bias"] = attentionBias;
            json["mlp_bias"] = true;
        });
        Assert.That((config.QkvBias, config.OutputBias), Is.EqualTo((qkv, output)));
        Assert.That(config.QkNorm, Is.EqualTo(architecture == "Qwen3ForCausalLM"));
        Assert.That(config.MlpBias, Is.EqualTo(architecture == "LlamaForCausalLM"));
    }

    [TestCase("LlamaForCausalLM", 16)]
    [TestCase("Qwen2ForCausalLM", 16)]
    [TestCase("Qwen3ForCausalLM", 128)]
    public void Parse_OptionalFieldsAbsent_TakesTransformersDefaults(string architecture, int headDim)
    {
        ModelConfig config = Parse($$"""
            {"architectures":["{{architecture}}"],"hidden_size":64,"intermediate_size":160,"num_hidden_layers":4,
             "num_attention_heads":4,"num_key_value_heads":null,"vocab_size":512,"max_position_embeddings":2048,
             "rope_scaling":null}
            """);
        Assert.That((config.KeyValueHeads, config.HeadDim, config.RmsNormEpsilon, config.RopeTheta),
            Is.EqualTo((4, headDim, 1e-6, 10000.0)));
        Assert.That((config.TieWordEmbeddings, config.RopeScaling, config.BosTokenId, config.TorchDtype),
            Is.EqualTo((false, default(RopeScaling), default(int?), default(DType?))));
        Assert.That(config.EosTokenIds, Is.Empty);
    }

    [Test]
    public void Parse_RopeParameters_HoldThetaAndScaling()
    {
        ModelConfig config = Edit(json =>
        {
            json.Remove("rope_theta");
            JsonNode scaling = json["rope_scaling"]!.DeepClone();
            json.Remove("rope_scaling");
            scaling["rope_theta"] = 7000;
            json["rope_parameters"] = scaling;
            json["dtype"] = "torch.float16";
        });
        Assert.That(config.RopeTheta, Is.EqualTo(7000));
        Assert.That(config.RopeScaling, Is.EqualTo(Parse(Llama).RopeScaling));
        Assert.That(config.TorchDtype, Is.EqualTo(DType.F16));
    }

    [TestCase("""{"rope_type":"default"}""", null)]
    [TestCase("""{"type":"default"}""", null)]
    [TestCase("""{"type":"linear","factor":2}""", 2.0)]
    [TestCase("""{"rope_type":"linear","type":"llama3","factor":2.5}""", 2.5)]
    public void Parse_RopeTypes_AreAccepted(string scaling, double? linearFactor)
    {
        ModelConfig config = Edit(json => json["rope_scaling"] = JsonNode.Parse(scaling));
        Assert.That(config.RopeScaling, Is.EqualTo(
            linearFactor is double factor ? new RopeScaling { Kind = RopeScalingKind.Linear, Factor = factor } : null));
    }

    // Arguments: member, its JSON (null removes it), the field in the error if another, part of its text.
    [TestCase("architectures", null, null, "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM")]
    [TestCase("architectures", "[]", null, "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM")]
    [TestCase("architectures", "[\"MistralForCausalLM\"]", null,
        "'MistralForCausalLM' is not supported; supported are LlamaForCausalLM")]
    [TestCase("architectures", "[5]", "architectures[0]", "must be a string, not a number")]
    [TestCase("architectures", "\"LlamaForCausalLM\"", null, "must be a list of strings, not a string")]
    [TestCase("hidden_size", null, null, "is missing")]
    [TestCase("hidden_size", "0", null, "is 0; it must lie between 1 and 262144")]
    [TestCase("hidden_size", "-64", null, "between")]
    [TestCase("hidden_size", "64.5", null, "must be an integer, not this number")]
    [TestCase("hidden_size", "\"64\"", null, "must be an integer, not a string")]
    [TestCase("hidden_size", "99999999999999999999", null, "must be an integer")]
    [TestCase("hidden_size", "4294967360", null, "is 4294967360")]
    [TestCase("hidden_size", "62", "num_attention_heads", "does not divide hidden_size 62")]
    [TestCase("hidden_size", "60", "head_dim", "is 15; the rotary embedding needs an even size")]
    [TestCase("intermediate_size", null, null, "is missing")]
    [TestCase("intermediate_size", "0", null, "between")]
    [TestCase("num_hidden_layers", null, null, "is missing")]
    [TestCase("num_hidden_layers", "4097", null, "between")]
    [TestCase("num_attention_heads", null, null, "is missing")]
    [TestCase("num_attention_heads", "0", null, "between")]
    [TestCase("num_key_value_heads", "3", null, "does not divide the 4 attention heads")]
    [TestCase("num_key_value_heads", "8", null, "does not divide the 4 attention heads")]
    [TestCase("head_dim", "15", null, "needs an even size")]
    [TestCase("head_dim", "5000", null, "between")]
    [TestCase("vocab_size", null, null, "is missing")]
    [TestCase("vocab_size", "2000000000", null, "between")]
    [TestCase("max_position_embeddings", null, null, "is missing")]
    [TestCase("max_position_embeddings", "-1", null, "between")]
    [TestCase("rms_norm_eps", "0", null, "is 0; it must lie between")]
    [TestCase("rms_norm_eps", "1e400", null, "must lie between")]
    [TestCase("rms_norm_eps", "true", null, "must be a number, not true or false")]
    [TestCase("rope_theta", "-10000", null, "between")]
    [TestCase("rope_theta", "1e999", null, "between")]
    [TestCase("rope_scaling", "{\"rope_type\":\"yarn\",\"factor\":4}", "rope_scaling.rope_type",
        "'yarn' is not supported; supported are default, linear, llama3")]
    [TestCase("rope_scaling", "{\"type\":\"dynamic\",\"factor\":4}", "rope_scaling.rope_type", "'dynamic' is not supported")]
    [TestCase("rope_scaling", "{\"type\":\"longrope\"}", "rope_scaling.rope_type", "'longrope' is not supported")]
    [TestCase("rope_scaling", "{\"factor\":4}", "rope_scaling.rope_type", "is missing")]
    [TestCase("rope_scaling", "{\"type\":\"linear\"}", "rope_scaling.factor", "is missing")]
    [TestCase("rope_scaling", "{\"type\":\"linear\",\"factor\":0}", "rope_scaling.factor", "between")]
    [TestCase("rope_scaling", "{\"type\":\"llama3\",\"low_freq_factor\":4,\"high_freq_factor\":4}",
        "rope_scaling.high_freq_factor", "must be above")]
    [TestCase("rope_scaling", "{\"type\":\"llama3\",\"low_freq_factor\":1,\"high_freq_factor\":4,\"factor\":8}",
        "rope_scaling.original_max_position_embeddings", "is missing")]
    [TestCase("rope_scaling", "4", null, "must be an object, not a number")]
    [TestCase("rope_parameters", "{\"rope_type\":\"default\"}", null, "something else than rope_scaling")]
    [TestCase("rope_parameters", "{\"full_attention\":{\"rope_type\":\"default\"}}", "rope_parameters.full_attention",
        "per layer type")]
    [TestCase("partial_rotary_factor", "0.5", null, "0.5 is not supported")]
    [TestCase("tie_word_embeddings", "1", null, "must be true or false, not a number")]
    [TestCase("attention_bias", "\"no\"", null, "must be true or false, not a string")]
    [TestCase("bos_token_id", "-1", null, "between")]
    [TestCase("eos_token_id", "[1,-2]", "eos_token_id[1]", "is -2")]
    [TestCase("eos_token_id", "\"2\"", null, "must be a token id or a list of them")]
    [TestCase("torch_dtype", "\"float64\"", null, "'float64' is not supported; supported are float32, float16, bfloat16")]
    [TestCase("hidden_act", "\"gelu\"", null, "'gelu' is not supported; only 'silu' is")]
    [TestCase("use_sliding_window", "true", null, "sees the whole prefix")]
    [TestCase("layer_types", "[\"full_attention\",\"sliding_attention\"]", null, "'sliding_attention' is not supported")]
    [TestCase("quantization_config", "{\"quant_method\":\"gptq\"}", null, "quantized checkpoints are not supported")]
    public void Parse_BadField_NamesIt(string name, string? value, string? field, string fault)
    {
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => Edit(json =>
        {
            json.Remove(name);
            if (value is not null)
            {
                json[name] = JsonNode.Parse(value);
            }
        }))!;
        Assert.That((e.File, e.Field), Is.EqualTo(("config.json", field ?? name)));
        Assert.That(e.Fault, Does.Contain(fault));
    }

    [TestCase("", "not valid JSON")]
    [TestCase("[]", "must be an object, not a list")]
    [TestCase("{\"architectures\":[],\"architectures\":[]}", "uplicate")]
    [TestCase("{\"a\":\"\\udc00\"}", "escape")]
    public void Parse_BadJson_IsRefused(string json, string fault)
    {
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => Parse(json))!;
        Assert.That((e.File, e.Field), Is.EqualTo(("config.json", "JSON")));
        Assert.That(e.Fault, Does.Contain(fault));
    }

    [Test]
    public void Parse_LongUnknownName_IsShortenedInTheError()
    {
        InvalidFileException e = Assert.Throws<InvalidFileException>(
            () => Edit(json => json["hidden_act"] = new string('x', 100_000)))!;
        Assert.That(e.Message, Has.Length.LessThan(300));
    }

    [Test]
    public void Load_MissingOrHugeFile_IsRefused()
    {
        using var folder = new TempFolder();
        Assert.That(() => ModelConfig.Load(folder.Path), Throws.TypeOf<InvalidFileException>()
            .With.Message.Contains("config.json: file: does not exist"));
        using (FileStream huge = File.Create(folder["config.json"]))
        {
            huge.SetLength(JsonFile.ConfigBytesMax + 1);
        }

        Assert.That(() => ModelConfig.Load(folder.Path), Throws.TypeOf<InvalidFileException>().With.Message.Contains("at most"));
    }

    [Test]
    public void Load_ByteOrderMark_IsSkipped()
    {
        using var folder = new TempFolder();
        File.WriteAllText(folder["config.json"], Llama, new UTF8Encoding(encoderShouldEmitUTF8Identifier: true));
        Assert.That(ModelConfig.Load(folder["config.json"]).HiddenSize, Is.EqualTo(64));
    }

    [Test]
    public void ToJson_EveryFamily_ReadsBackAsTheSame()
    {
        var scalings = new RopeScaling?[]
        {
            null,
            new() { Kind = RopeScalingKind.Linear, Factor = 1.25 },
            Parse(Llama).RopeScaling,
        };
        foreach (ModelArchitecture architecture in Enum.GetValues<ModelArchitecture>())
        {
            for (int i = 0; i < 6; i++)
            {
                var config = new ModelConfig
                {
                    Architecture = architecture,
                    HiddenSize = 96,
                    IntermediateSize = 100,
                    LayerCount = 3,
                    AttentionHeads = 6,
                    KeyValueHeads = 3,
                    HeadDim = 24,
                    VocabularySize = 1000,
                    MaxPositions = 77,
                    RmsNormEpsilon = 1.25e-6,
                    RopeTheta = 12345.678,
                    RopeScaling = scalings[i % 3],
                    TieWordEmbeddings = i % 2 == 0,
                    AttentionBias = i % 2 == 1 && architecture != ModelArchitecture.Qwen2,
                    MlpBias = i % 2 == 1 && architecture == ModelArchitecture.Llama,
                    BosTokenId = i == 0 ? null : i,
                    EosTokenIds = [.. Enumerable.Range(5, i % 3)],
                    TorchDtype = i < 3 ? (DType)i : null,
                };
                ModelConfig back = Parse(config.ToJson());
                Assert.That(back.EosTokenIds, Is.EqualTo(config.EosTokenIds));
                Assert.That(back with { EosTokenIds = config.EosTokenIds }, Is.EqualTo(config));
            }
        }
    }

    [Test]
    public void ToJson_BiasWithoutPlace_IsRefused() =>
        Assert.That(
            () => (Parse(Llama) with { Architecture = ModelArchitecture.Qwen3, MlpBias = true }).ToJson(),
            Throws.InvalidOperationException);

    [Test]
    public void Save_ThenLoad_IsTheSameModel()
    {
        using var folder = new TempFolder();
        ModelConfig config = Parse(Llama);
        config.Save(folder.Path);
        Assert.That(ModelConfig.Load(folder.Path) with { EosTokenIds = config.EosTokenIds }, Is.EqualTo(config));
    }

    [Test]
    public void InverseFrequencies_NoScaling_ArePowersOfTheta() =>
        Assert.That(Frequencies(null), Is.EqualTo([1, 0.1, 0.01, 0.001]).Within(1e-15));

    [Test]
    public void InverseFrequencies_Linear_AreDivided() =>
        Assert.That(Frequencies(new RopeScaling { Kind = RopeScalingKind.Linear, Factor = 4 }),
            Is.EqualTo([0.25, 0.025, 0.0025, 0.00025]).Within(1e-15));

    // Wavelengths 2 pi (1, 10, 100, 1000) = 6.28, 62.8, 628, 6283 against the bounds 1000 / 4 = 250 and 1000 / 1: the first two
    // are kept, the last is divided by 8. The third: smooth = (1000 / 628.3185 - 1) / 3 = (5 / pi - 1) / 3 = 0.19718314,
    // 0.01 ((1 - smooth) / 8 + smooth) = 0.00125 + 0.00875 smooth = 0.0029753525.
    [Test]
    public void InverseFrequencies_Llama3_InterpolateInTheMiddle() =>
        Assert.That(Frequencies(Parse(Llama).RopeScaling), Is.EqualTo([1, 0.1, 0.00297535250684694, 0.000125]).Within(1e-15));

    internal static ModelConfig Parse(string json) => ModelConfig.Parse(Encoding.UTF8.GetBytes(json), "config.json");

    private static ModelConfig Edit(Action<JsonObject> edit)
    {
        JsonObject json = JsonNode.Parse(Llama)!.AsObject();
        edit(json);
        return Parse(json.ToJsonString());
    }

    private static double[] Frequencies(RopeScaling? scaling) =>
        (Parse(Llama) with { HeadDim = 8, RopeTheta = 10000, RopeScaling = scaling }).InverseFrequencies();
}
