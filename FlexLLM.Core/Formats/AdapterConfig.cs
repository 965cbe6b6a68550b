using System.Buffers;
using System.Text.Json;

namespace FlexLLM.Formats;

/// <summary>The methods whose adapters can be read and written.</summary>
internal enum AdapterMethod
{
    /// <summary>peft_type LORA.</summary>
    Lora,

    /// <summary>peft_type IA3.</summary>
    Ia3,

    /// <summary>
    /// peft_type BOTTLENECK: a serial Adapter under the keys of the LLM-Adapters fork of PEFT, which has no such method itself.
    /// </summary>
    Bottleneck,
}

/// <summary>
/// adapter_config.json of an adapter. Variants that change the computation (DoRA, per-module ranks, biases, extra modules,
/// parallel adapters) are refused by name, never ignored.
/// </summary>
internal sealed record AdapterConfig
{
    public const string FileName = "adapter_config.json";

    /// <summary>The spelling in target_modules that means every linear layer but the head.</summary>
    public const string AllLinearName = "all-linear";

    /// <summary>Largest rank.</summary>
    public const int RankMax = 4096;

    private static readonly string[] Types = ["LORA", "IA3", "BOTTLENECK"];

    private static readonly string[] Activations = ["relu", "silu"];

    // Each must be absent, null, false or empty.
    private static readonly string[] Refused =
    [
        "alora_invocation_tokens", "alpha_pattern", "arrow_config", "exclude_modules", "fan_in_fan_out", "layer_replication",
        "layers_pattern", "layers_to_transform", "lora_bias", "megatron_config", "modules_to_save", "rank_pattern",
        "target_parameters", "trainable_token_indices", "use_adapterp", "use_dora", "use_parallel_adapter", "use_qalora",
    ];

    private static readonly SearchValues<char> NameCharacters =
        SearchValues.Create("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.");

    public AdapterMethod Method { get; init; }

    /// <summary>"r" of LoRA, "bottleneck_size" of a serial Adapter: width of the bottleneck. (IA)^3 has none.</summary>
    public int Rank { get; init; }

    /// <summary>"lora_alpha".</summary>
    public double Alpha { get; init; }

    /// <summary>"non_linearity" of a serial Adapter: silu instead of relu.</summary>
    public bool UsesSilu { get; init; }

    /// <summary>"feedforward_modules" of (IA)^3: target modules whose input is scaled.</summary>
    public IReadOnlyList<string> FeedforwardModules { get; init; } = [];

    /// <summary>"use_rslora": scale by the square root of the rank.</summary>
    public bool UseRsLora { get; init; }

    /// <summary>Names of the modules that have a bypass; empty when <see cref="AllLinear"/>.</summary>
    public IReadOnlyList<string> TargetModules { get; init; } = [];

    /// <summary>target_modules is "all-linear".</summary>
    public bool AllLinear { get; init; }

    /// <summary>"lora_dropout", carried from file to file; training here does not drop.</summary>
    public double Dropout { get; init; }

    public string? BaseModelNameOrPath { get; init; }

    /// <summary>Factor of the bypass output.</summary>
    public double Scale => UseRsLora ? Alpha / Math.Sqrt(Rank) : Alpha / Rank;

    /// <summary>Reads adapter_config.json of an adapter folder, or the given file.</summary>
    /// <exception cref="InvalidFileException">The file is missing or malformed, or asks for something not supported.</exception>
    public static AdapterConfig Load(string folderOrFile)
    {
        string path = Directory.Exists(folderOrFile) ? Path.Combine(folderOrFile, FileName) : folderOrFile;
        return Read(JsonFile.Load(path), path);
    }

    /// <summary>Parses the text of such a file.</summary>
    public static AdapterConfig Parse(ReadOnlySpan<byte> json, string fileNameForErrors) =>
        Read(JsonFile.Parse(json, fileNameForErrors, "JSON"), fileNameForErrors);

    /// <summary>Writes adapter_config.json into a folder, with the keys that PEFT 0.17 writes.</summary>
    public void Save(string folder) => AtomicFile.WriteJson(Path.Combine(folder, FileName), Write);

    /// <summary>Writes the object with the keys that PEFT 0.17 writes, in its order.</summary>
    public void Write(Utf8JsonWriter json)
    {
        json.WriteStartObject();
        switch (Method)
        {
            case AdapterMethod.Lora:
                WriteLora(json);
                break;
            case AdapterMethod.Ia3:
                WriteIa3(json);
                break;
            default:
                WriteBottleneck(json);
                break;
        }

        json.WriteEndObject();
    }

    private void WriteIa3(Utf8JsonWriter json)
    {
        json.WriteNull("auto_mapping");
        json.WriteString("base_model_name_or_path", BaseModelNameOrPath);
        json.WriteNull("exclude_modules");
        json.WriteBoolean("fan_in_fan_out", false);
        WriteStrings(json, "feedforward_modules", FeedforwardModules);
        json.WriteBoolean("inference_mode", true);
        json.WriteBoolean("init_ia3_weights", true);
        json.WriteNull("modules_to_save");
        json.WriteString("peft_type", Types[(int)Method]);
        json.WriteNull("revision");
        WriteTargetModules(json);
        json.WriteString("task_type", "CAUSAL_LM");
    }

    private void WriteBottleneck(Utf8JsonWriter json)
    {
        json.WriteNumber("adapter_dropout", 0);
        json.WriteString("base_model_name_or_path", BaseModelNameOrPath);
        json.WriteNumber("bottleneck_size", Rank);
        json.WriteBoolean("inference_mode", true);
        json.WriteNull("modules_to_save");
        json.WriteString("non_linearity", Activations[UsesSilu ? 1 : 0]);
        json.WriteString("peft_type", Types[(int)Method]);
        json.WriteNumber("scaling", 1);
        WriteTargetModules(json);
        json.WriteString("task_type", "CAUSAL_LM");
        json.WriteBoolean("use_adapterp", false);
        json.WriteBoolean("use_parallel_adapter", false);
    }

    private void WriteLora(Utf8JsonWriter json)
    {
        WriteEmptyObject(json, "alpha_pattern");
        json.WriteNull("auto_mapping");
        json.WriteString("base_model_name_or_path", BaseModelNameOrPath);
        json.WriteString("bias", "none");
        WriteNulls(json, "corda_config", "eva_config", "exclude_modules");
        json.WriteBoolean("fan_in_fan_out", false);
        json.WriteBoolean("inference_mode", true);
        json.WriteBoolean("init_lora_weights", true);
        WriteNulls(json, "layer_replication", "layers_pattern", "layers_to_transform");
        WriteEmptyObject(json, "loftq_config");
        json.WriteNumber("lora_alpha", Alpha);
        json.WriteBoolean("lora_bias", false);
        json.WriteNumber("lora_dropout", Dropout);
        json.WriteNull("megatron_config");
        json.WriteString("megatron_core", "megatron.core");
        json.WriteNull("modules_to_save");
        json.WriteString("peft_type", Types[(int)Method]);
        json.WriteNumber("qalora_group_size", 16);
        json.WriteNumber("r", Rank);
        WriteEmptyObject(json, "rank_pattern");
        json.WriteNull("revision");
        WriteTargetModules(json);
        json.WriteNull("target_parameters");
        json.WriteString("task_type", "CAUSAL_LM");
        json.WriteNull("trainable_token_indices");
        json.WriteBoolean("use_dora", false);
        json.WriteBoolean("use_qalora", false);
        json.WriteBoolean("use_rslora", UseRsLora);
    }

    private static AdapterConfig Read(JsonElement root, string file)
    {
        var json = new JsonFields(root, file);
        string type = json.String("peft_type");
        int method = Array.IndexOf(Types, type);
        if (method < 0)
        {
            throw json.Fault("peft_type", $"{JsonFile.Quote(type)} is not supported; {string.Join(", ", Types)} are");
        }

        Expect(json, "task_type", json.OptionalString("task_type") ?? "CAUSAL_LM", "CAUSAL_LM");
        Expect(json, "bias", json.OptionalString("bias") ?? "none", "none");
        foreach (string name in Refused)
        {
            if (json.TryGet(name, out JsonElement value) && !IsEmpty(value))
            {
                throw json.Fault(name, "is set, but this kind of adapter is not supported; only plain LoRA and rsLoRA are");
            }
        }

        (string[] modules, bool allLinear) = ReadTargetModules(json);
        var common = new AdapterConfig
        {
            Method = (AdapterMethod)method,
            TargetModules = modules,
            AllLinear = allLinear,
            BaseModelNameOrPath = json.OptionalString("base_model_name_or_path"),
        };
        return common.Method switch
        {
            AdapterMethod.Lora => common with
            {
                Rank = json.Int32("r", 1, RankMax),
                Alpha = json.Double("lora_alpha", -1e6, 1e6),
                UseRsLora = json.OptionalBool("use_rslora") ?? false,
                Dropout = json.OptionalDouble("lora_dropout", 0, 1) ?? 0,
            },
            AdapterMethod.Ia3 => common with { FeedforwardModules = json.OptionalStrings("feedforward_modules") ?? [] },
            _ => ReadBottleneck(json, common),
        };
    }

    private static AdapterConfig ReadBottleneck(JsonFields json, AdapterConfig common)
    {
        string activation = json.OptionalString("non_linearity") ?? Activations[0];
        int index = Array.IndexOf(Activations, activation);
        if (index < 0)
        {
            throw json.Fault("non_linearity", $"{JsonFile.Quote(activation)} is not supported; {string.Join(", ", Activations)} are");
        }

        return json.OptionalDouble("scaling", -1e6, 1e6) is null or 1
            ? common with { Rank = json.Int32("bottleneck_size", 1, RankMax), UsesSilu = index == 1 }
            : throw json.Fault("scaling", "is not 1; scaled serial adapters are not supported");
    }

    private static (string[] Modules, bool AllLinear) ReadTargetModules(JsonFields json)
    {
        if (!json.TryGet("target_modules", out JsonElement value))
        {
            throw json.Missing("target_modules");
        }

        if (value.ValueKind == JsonValueKind.String)
        {
            string text = value.GetString()!;
            if (text == AllLinearName)
            {
                return ([], true);
            }

            return IsModuleName(text)
                ? ([text], false)
                : throw json.Fault(
                    "target_modules",
                    $"{JsonFile.Quote(text)} is neither a plain module name nor '{AllLinearName}'; patterns are not supported");
        }

        string[] names = json.OptionalStrings("target_modules")!;
        if (names.Length == 0)
        {
            throw json.Fault("target_modules", "is empty; name at least one module");
        }

        for (int i = 0; i < names.Length; i++)
        {
            if (!IsModuleName(names[i]))
            {
                throw json.Fault($"target_modules[{i}]", $"{JsonFile.Quote(names[i])} is not a module name");
            }

            if (Array.IndexOf(names, names[i]) < i)
            {
                throw json.Fault($"target_modules[{i}]", $"{JsonFile.Quote(names[i])} is listed twice");
            }
        }

        return (names, false);
    }

    private static bool IsModuleName(string text) => text.Length > 0 && !text.AsSpan().ContainsAnyExcept(NameCharacters);

    private static bool IsEmpty(JsonElement value) => value.ValueKind switch
    {
        JsonValueKind.False => true,
        JsonValueKind.Array => value.GetArrayLength() == 0,
        JsonValueKind.Object => value.GetPropertyCount() == 0,
        _ => false,
    };

    private static void Expect(JsonFields json, string field, string value, string expected)
    {
        if (value != expected)
        {
            throw json.Fault(field, $"{JsonFile.Quote(value)} is not supported; only '{expected}' is");
        }
    }

    private static void WriteNulls(Utf8JsonWriter json, params ReadOnlySpan<string> names)
    {
        foreach (string name in names)
        {
            json.WriteNull(name);
        }
    }

    private static void WriteEmptyObject(Utf8JsonWriter json, string name)
    {
        json.WriteStartObject(name);
        json.WriteEndObject();
    }

    private void WriteTargetModules(Utf8JsonWriter json)
    {
        if (AllLinear)
        {
            json.WriteString("target_modules", AllLinearName);
            return;
        }

        WriteStrings(json, "target_modules", TargetModules);
    }

    private static void WriteStrings(Utf8JsonWriter json, string name, IReadOnlyList<string> values)
    {
        json.WriteStartArray(name);
        foreach (string value in values)
        {
            json.WriteStringValue(value);
        }

        json.WriteEndArray();
    }
}
