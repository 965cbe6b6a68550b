using FlexLLM.Backends;
using FlexLLM.Formats;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Adapters;

/// <summary>
/// Adapters in the folder format of HuggingFace PEFT: adapter_config.json and adapter_model.safetensors with the tensors of each
/// module under "base_model.model." and the module's name in the checkpoint. LoRA: lora_A [rank, in], lora_B [out, rank];
/// (IA)^3: ia3_l [out, 1], or [1, in] of feedforward modules; serial Adapter, as LLM-Adapters names them: adapter_down [size, out]
/// and adapter_up [out, size] with their biases.
/// </summary>
internal static class PeftFolder
{
    public const string WeightsFileName = "adapter_model.safetensors";

    /// <summary>Name of a LoRA site's tensor in the file; matrix is 'A' or 'B'.</summary>
    public static string TensorName(int site, char matrix) => TensorName(site, $"lora_{matrix}");

    /// <summary>Name of a site's tensor in the file, from the name that its network gives it.</summary>
    public static string TensorName(int site, string weight)
    {
        const string Bias = "_bias";
        string suffix = weight.EndsWith(Bias, StringComparison.Ordinal) ? $"{weight[..^Bias.Length]}.bias"
            : weight == "ia3_l" ? weight
            : $"{weight}.weight";
        return $"base_model.model.{AdapterSites.NameOf(site)}.{suffix}";
    }

    /// <summary>Reads what kind of adapter a folder holds, without touching the device.</summary>
    /// <exception cref="InvalidFileException">A malformed file, or an adapter that does not fit the model.</exception>
    public static PeftConfig ReadConfig(string folder, ModelConfig model)
    {
        PeftConfig config = ConfigOf(AdapterConfig.Load(folder));
        try
        {
            PeftAdapter.Validate(config, model);
            return config;
        }
        catch (RequestRejectedException e)
        {
            throw new InvalidFileException(Path.Combine(folder, AdapterConfig.FileName), "r, target_modules", e.Message, e);
        }
    }

    /// <summary>Reads an adapter for this model.</summary>
    /// <exception cref="InvalidFileException">A malformed file, or an adapter of another model, rank or module set.</exception>
    public static PeftAdapter Load(string folder, LoadedModel model)
    {
        PeftConfig config = ReadConfig(folder, model.Whole);
        string weightsPath = Path.Combine(folder, WeightsFileName);
        if (!File.Exists(weightsPath))
        {
            throw new InvalidFileException(weightsPath, "file", "does not exist");
        }

        using SafetensorsFile weights = SafetensorsFile.Open(weightsPath);
        var adapter = new PeftAdapter(model.Backend, model.Whole, config, model.Shard);
        try
        {
            CheckNames(weights, adapter);
            foreach ((int site, AdapterTensor tensor) in adapter.Tensors())
            {
                BypassWeight whole = tensor.Whole;
                Layout layout = Layout.Of(adapter[site]!.Network, whole);
                float[] values = Read(weights, TensorName(site, whole.Name), layout.Shape);
                tensor.Upload(model.Backend, layout.IsTransposed ? Transpose(values, whole.Wide, whole.Inner) : values);
            }

            return adapter;
        }
        catch
        {
            adapter.Dispose();
            throw;
        }
    }

    /// <summary>A host copy of an adapter that can be written without the device.</summary>
    public static IReadOnlyList<TensorToWrite> Download(PeftAdapter adapter, IComputeBackend backend)
    {
        var tensors = new List<TensorToWrite>();
        foreach ((int site, AdapterTensor tensor) in adapter.Tensors())
        {
            BypassWeight whole = tensor.Whole;
            float[] values = tensor.Download(backend);
            Layout layout = Layout.Of(adapter[site]!.Network, whole);
            tensors.Add(TensorToWrite.FromFloats(
                TensorName(site, whole.Name), layout.Shape, layout.IsTransposed ? Transpose(values, whole.Inner, whole.Wide) : values));
        }

        return tensors;
    }

    /// <summary>Writes a folder that PEFT reads back.</summary>
    public static void Save(
        string folder, PeftConfig config, IReadOnlyList<TensorToWrite> tensors, string? baseModel,
        IReadOnlyDictionary<string, string>? metadata = null)
    {
        Directory.CreateDirectory(folder);
        var all = new Dictionary<string, string>(metadata ?? new Dictionary<string, string>()) { ["format"] = "pt" };
        SafetensorsWriter.Write(Path.Combine(folder, WeightsFileName), tensors, all);
        (FileOf(config) with { TargetModules = config.TargetModules, BaseModelNameOrPath = baseModel }).Save(folder);
    }

    /// <summary>[rows, columns] to [columns, rows].</summary>
    public static float[] Transpose(float[] matrix, int rows, int columns)
    {
        Check.That(matrix.Length == rows * columns);
        float[] result = new float[matrix.Length];
        for (int r = 0; r < rows; r++)
        {
            for (int c = 0; c < columns; c++)
            {
                result[(c * rows) + r] = matrix[(r * columns) + c];
            }
        }

        return result;
    }

    // A tensor too many means an adapter for more layers or modules than this model or its config has.
    private static void CheckNames(SafetensorsFile weights, PeftAdapter adapter)
    {
        HashSet<string> expected = [.. adapter.Tensors().Select(t => TensorName(t.Site, t.Tensor.Spec.Name))];
        foreach (string name in weights.Tensors.Keys)
        {
            if (!expected.Contains(name))
            {
                throw new InvalidFileException(
                    weights.Path, name, "is not a tensor of this model and adapter_config.json's target_modules");
            }
        }
    }

    private static PeftConfig ConfigOf(AdapterConfig file)
    {
        IReadOnlyList<string> modules = file.AllLinear ? AdapterSites.ModuleNames : file.TargetModules;
        return file.Method switch
        {
            AdapterMethod.Lora => new LoraConfig
            {
                Rank = file.Rank,
                Alpha = (float)file.Alpha,
                UseRsLora = file.UseRsLora,
                TargetModules = modules,
            },
            AdapterMethod.Ia3 => new Ia3Config { TargetModules = modules, FeedforwardModules = file.FeedforwardModules },
            _ => new SerialAdapterConfig
            {
                Size = file.Rank,
                Activation = file.UsesSilu ? AdapterActivation.Silu : AdapterActivation.Relu,
                TargetModules = modules,
            },
        };
    }

    private static AdapterConfig FileOf(PeftConfig config) => config switch
    {
        LoraConfig lora => new AdapterConfig { Rank = lora.Rank, Alpha = lora.Alpha, UseRsLora = lora.UseRsLora },
        Ia3Config ia3 => new AdapterConfig { Method = AdapterMethod.Ia3, FeedforwardModules = ia3.FeedforwardModules },
        SerialAdapterConfig serial => new AdapterConfig
        {
            Method = AdapterMethod.Bottleneck,
            Rank = serial.Size,
            UsesSilu = serial.Activation == AdapterActivation.Silu,
        },
        _ => throw new ArgumentOutOfRangeException(nameof(config), config, "Give the new method its file format."),
    };

    private static float[] Read(SafetensorsFile file, string name, long[] shape)
    {
        SafetensorsTensor tensor = file.Get(name);
        if (!tensor.Shape.SequenceEqual(shape))
        {
            throw new InvalidFileException(
                file.Path, name,
                $"has shape [{string.Join(", ", tensor.Shape)}]; this model and adapter_config.json ask for [{string.Join(", ", shape)}]");
        }

        float[] values = tensor.ToFloats();
        int bad = Array.FindIndex(values, v => !float.IsFinite(v));
        long columns = shape[^1];
        return bad < 0
            ? values
            : throw new InvalidFileException(file.Path, name, $"holds NaN or infinity at [{bad / columns}, {bad % columns}]");
    }

    /// <summary>How a tensor [inner, wide] or a vector stands in the file.</summary>
    private readonly record struct Layout(long[] Shape, bool IsTransposed)
    {
        public static Layout Of(BypassNetwork network, BypassWeight spec) => spec switch
        {
            { IsVector: true } when network is ScaleNetwork => new Layout(
                network.Attachment == BypassAttachment.Input ? [1, spec.Wide] : [spec.Wide, 1], false),
            { IsVector: true } => new Layout([spec.Wide], false),
            { Widens: true } => new Layout([spec.Wide, spec.Inner], true),
            _ => new Layout([spec.Inner, spec.Wide], false),
        };
    }
}
