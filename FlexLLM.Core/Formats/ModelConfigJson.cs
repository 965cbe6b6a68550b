using System.Text.Json;

namespace FlexLLM.Formats;

/// <summary>
/// config.json to <see cref="ModelConfig"/> and back. Takes what transformers 4 and 5 write; refuses by name whatever would
/// change the computation in a way that this library does not build.
/// </summary>
internal static class ModelConfigJson
{
    private const int LengthMax = 1 << 30;

    private static readonly (ModelArchitecture Architecture, string Class, string ModelType)[] Families =
    [
        (ModelArchitecture.Llama, "LlamaForCausalLM", "llama"),
        (ModelArchitecture.Qwen2, "Qwen2ForCausalLM", "qwen2"),
        (ModelArchitecture.Qwen3, "Qwen3ForCausalLM", "qwen3"),
    ];

    private static readonly (DType Type, string Name)[] DTypeNames =
        [(DType.F32, "float32"), (DType.F16, "float16"), (DType.BF16, "bfloat16")];

    public static ModelConfig Read(JsonElement root, string file)
    {
        var json = new JsonFields(root, file);
        ModelArchitecture architecture = ReadArchitecture(json);
        RefuseUnsupported(json);
        int hidden = json.Int32("hidden_size", 1, 1 << 18);
        int heads = json.Int32("num_attention_heads", 1, 1 << 12);
        int keyValueHeads = json.OptionalInt32("num_key_value_heads", 1, 1 << 12) ?? heads;
        if (heads % keyValueHeads != 0)
        {
            throw json.Fault("num_key_value_heads", $"is {keyValueHeads}, which does not divide the {heads} attention heads");
        }

        (double theta, RopeScaling? scaling) = ReadRope(json);
        return new ModelConfig
        {
            Architecture = architecture,
            HiddenSize = hidden,
            IntermediateSize = json.Int32("intermediate_size", 1, 1 << 20),
            LayerCount = json.Int32("num_hidden_layers", 1, 1 << 12),
            AttentionHeads = heads,
            KeyValueHeads = keyValueHeads,
            HeadDim = ReadHeadDim(json, architecture, hidden, heads),
            VocabularySize = json.Int32("vocab_size", 1, 1 << 24),
            MaxPositions = json.Int32("max_position_embeddings", 1, LengthMax),
            RmsNormEpsilon = json.OptionalDouble("rms_norm_eps", 1e-30, 1) ?? 1e-6,
            RopeTheta = theta,
            RopeScaling = scaling,
            TieWordEmbeddings = json.OptionalBool("tie_word_embeddings") ?? false,
            AttentionBias = json.OptionalBool("attention_bias") is true && architecture != ModelArchitecture.Qwen2,
            MlpBias = json.OptionalBool("mlp_bias") is true && architecture == ModelArchitecture.Llama,
            BosTokenId = json.OptionalInt32("bos_token_id", 0, int.MaxValue),
            EosTokenIds = json.OptionalTokenIds("eos_token_id") ?? [],
            TorchDtype = ReadDType(json, "dtype") ?? ReadDType(json, "torch_dtype"),
        };
    }

    public static void Write(Utf8JsonWriter json, ModelConfig config)
    {
        if (config.MlpBias && config.Architecture != ModelArchitecture.Llama)
        {
            throw new InvalidOperationException("MlpBias is set, but only Llama has a place for it in config.json.");
        }

        (_, string className, string modelType) = Families.Single(family => family.Architecture == config.Architecture);
        json.WriteStartObject();
        json.WriteStartArray("architectures");
        json.WriteStringValue(className);
        json.WriteEndArray();
        if (config.Architecture != ModelArchitecture.Qwen2)
        {
            json.WriteBoolean("attention_bias", config.AttentionBias);
        }

        if (config.BosTokenId is int bos)
        {
            json.WriteNumber("bos_token_id", bos);
        }

        WriteTokenIds(json, "eos_token_id", config.EosTokenIds);
        json.WriteNumber("head_dim", config.HeadDim);
        json.WriteString("hidden_act", "silu");
        json.WriteNumber("hidden_size", config.HiddenSize);
        json.WriteNumber("intermediate_size", config.IntermediateSize);
        json.WriteNumber("max_position_embeddings", config.MaxPositions);
        if (config.Architecture == ModelArchitecture.Llama)
        {
            json.WriteBoolean("mlp_bias", config.MlpBias);
        }

        json.WriteString("model_type", modelType);
        json.WriteNumber("num_attention_heads", config.AttentionHeads);
        json.WriteNumber("num_hidden_layers", config.LayerCount);
        json.WriteNumber("num_key_value_heads", config.KeyValueHeads);
        json.WriteNumber("rms_norm_eps", config.RmsNormEpsilon);
        WriteRopeScaling(json, config.RopeScaling);
        json.WriteNumber("rope_theta", config.RopeTheta);
        json.WriteBoolean("tie_word_embeddings", config.TieWordEmbeddings);
        if (config.TorchDtype is DType type)
        {
            json.WriteString("torch_dtype", DTypeNames.Single(row => row.Type == type).Name);
        }

        if (config.Architecture != ModelArchitecture.Llama)
        {
            json.WriteBoolean("use_sliding_window", false);
        }

        json.WriteNumber("vocab_size", config.VocabularySize);
        json.WriteEndObject();
    }

    private static ModelArchitecture ReadArchitecture(JsonFields json)
    {
        string supported = string.Join(", ", Families.Select(family => family.Class));
        string[] names = json.OptionalStrings("architectures") ?? [];
        if (names.Length == 0)
        {
            throw json.Fault("architectures", $"is missing or empty; supported are {supported}");
        }

        int index = Array.FindIndex(Families, family => family.Class == names[0]);
        return index >= 0
            ? Families[index].Architecture
            : throw json.Fault("architectures", $"{JsonFile.Quote(names[0])} is not supported; supported are {supported}");
    }

    private static void RefuseUnsupported(JsonFields json)
    {
        string activation = json.OptionalString("hidden_act") ?? "silu";
        if (activation != "silu")
        {
            throw json.Fault("hidden_act", $"{JsonFile.Quote(activation)} is not supported; only 'silu' is");
        }

        if (json.OptionalBool("use_sliding_window") is true)
        {
            throw json.Fault("use_sliding_window", "is true, but attention always sees the whole prefix here");
        }

        string[] layerTypes = json.OptionalStrings("layer_types") ?? [];
        if (Array.Find(layerTypes, type => type != "full_attention") is string other)
        {
            throw json.Fault("layer_types", $"{JsonFile.Quote(other)} is not supported; only 'full_attention' is");
        }

        if (json.TryGet("quantization_config", out _))
        {
            throw json.Fault("quantization_config", "quantized checkpoints are not supported; use F32, F16 or BF16 weights");
        }
    }

    private static int ReadHeadDim(JsonFields json, ModelArchitecture architecture, int hidden, int heads)
    {
        int? given = json.OptionalInt32("head_dim", 1, 1 << 12);
        if (given is null && architecture == ModelArchitecture.Qwen3)
        {
            given = 128; // What transformers assumes for Qwen3, whatever the hidden size.
        }

        if (given is null && hidden % heads != 0)
        {
            throw json.Fault(
                "num_attention_heads", $"is {heads}, which does not divide hidden_size {hidden}, and head_dim is missing");
        }

        int headDim = given ?? (hidden / heads);
        return headDim % 2 == 0
            ? headDim
            : throw json.Fault("head_dim", $"is {headDim}; the rotary embedding needs an even size");
    }

    // transformers 4: rope_theta beside rope_scaling. transformers 5: both in rope_parameters, whose rope_theta wins.
    private static (double Theta, RopeScaling? Scaling) ReadRope(JsonFields json)
    {
        const double ThetaMin = 1;
        const double ThetaMax = 1e15;
        double theta = json.OptionalDouble("rope_theta", ThetaMin, ThetaMax) ?? 10000;
        CheckWholeRotary(json);
        RopeScaling? scaling = null;
        if (json.OptionalObject("rope_scaling") is JsonFields old)
        {
            scaling = ReadRopeScaling(old, typeRequired: true);
        }

        if (json.OptionalObject("rope_parameters") is JsonFields parameters)
        {
            theta = parameters.OptionalDouble("rope_theta", ThetaMin, ThetaMax) ?? theta;
            RopeScaling? both = ReadRopeScaling(parameters, typeRequired: false);
            if (json.TryGet("rope_scaling", out _) && both != scaling)
            {
                throw json.Fault("rope_parameters", "says something else than rope_scaling; keep one of them");
            }

            scaling = both;
        }

        return (theta, scaling);
    }

    private static RopeScaling? ReadRopeScaling(JsonFields json, bool typeRequired)
    {
        CheckWholeRotary(json);
        foreach (JsonProperty property in json.Element.EnumerateObject())
        {
            if (property.Value.ValueKind == JsonValueKind.Object)
            {
                throw json.Fault(property.Name, "rotary parameters per layer type are not supported");
            }
        }

        string? type = json.OptionalString("rope_type") ?? json.OptionalString("type");
        switch (type)
        {
            case null when typeRequired:
                throw json.Missing("rope_type");
            case null or "default":
                return null;
            case "linear":
                return new RopeScaling { Kind = RopeScalingKind.Linear, Factor = json.Double("factor", 1, 1e6) };
            case "llama3":
                return ReadLlama3(json);
            default:
                throw json.Fault("rope_type", $"{JsonFile.Quote(type)} is not supported; supported are default, linear, llama3");
        }
    }

    private static RopeScaling ReadLlama3(JsonFields json)
    {
        double low = json.Double("low_freq_factor", 1e-6, 1e6);
        double high = json.Double("high_freq_factor", 1e-6, 1e6);
        if (low >= high)
        {
            throw json.Fault("high_freq_factor", "must be above low_freq_factor");
        }

        return new RopeScaling
        {
            Kind = RopeScalingKind.Llama3,
            Factor = json.Double("factor", 1, 1e6),
            LowFrequencyFactor = low,
            HighFrequencyFactor = high,
            OriginalMaxPositions = json.Int32("original_max_position_embeddings", 1, LengthMax),
        };
    }

    private static void CheckWholeRotary(JsonFields json)
    {
        if (json.OptionalDouble("partial_rotary_factor", 0, 1) is double factor and not 1.0)
        {
            throw json.Fault("partial_rotary_factor", $"{factor} is not supported; the rotary embedding covers whole heads");
        }
    }

    private static DType? ReadDType(JsonFields json, string field)
    {
        if (json.OptionalString(field) is not string name)
        {
            return null;
        }

        string plain = name.StartsWith("torch.", StringComparison.Ordinal) ? name["torch.".Length..] : name;
        int index = Array.FindIndex(DTypeNames, row => row.Name == plain);
        return index >= 0
            ? DTypeNames[index].Type
            : throw json.Fault(field, $"{JsonFile.Quote(name)} is not supported; supported are float32, float16, bfloat16");
    }

    private static void WriteTokenIds(Utf8JsonWriter json, string name, IReadOnlyList<int> ids)
    {
        if (ids.Count == 1)
        {
            json.WriteNumber(name, ids[0]);
        }
        else if (ids.Count > 1)
        {
            json.WriteStartArray(name);
            foreach (int id in ids)
            {
                json.WriteNumberValue(id);
            }

            json.WriteEndArray();
        }
    }

    private static void WriteRopeScaling(Utf8JsonWriter json, RopeScaling? scaling)
    {
        if (scaling is null)
        {
            json.WriteNull("rope_scaling");
            return;
        }

        json.WriteStartObject("rope_scaling");
        json.WriteNumber("factor", scaling.Factor);
        if (scaling.Kind == RopeScalingKind.Llama3)
        {
            json.WriteNumber("high_freq_factor", scaling.HighFrequencyFactor);
            json.WriteNumber("low_freq_factor", scaling.LowFrequencyFactor);
            json.WriteNumber("original_max_position_embeddings", scaling.OriginalMaxPositions);
        }

        json.WriteString("rope_type", scaling.Kind == RopeScalingKind.Llama3 ? "llama3" : "linear");
        json.WriteEndObject();
    }
}
