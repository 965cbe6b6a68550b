using FlexLLM.Backends;
using FlexLLM.Formats;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Adapters;

/// <summary>
/// Adapters in the folder format of HuggingFace PEFT: adapter_config.json and adapter_model.safetensors with lora_A [rank, in]
/// and lora_B [out, rank] under "base_model.model." and the module's name in the checkpoint.
/// </summary>
internal static class PeftFolder
{
    public const string WeightsFileName = "adapter_model.safetensors";

    /// <summary>Name of a site's tensor in the file; matrix is 'A' or 'B'.</summary>
    public static string TensorName(int site, char matrix) => $"base_model.model.{AdapterSites.NameOf(site)}.lora_{matrix}.weight";

    /// <summary>Reads what kind of adapter a folder holds, without touching the device.</summary>
    /// <exception cref="InvalidFileException">A malformed file, or an adapter that does not fit the model.</exception>
    public static LoraConfig ReadConfig(string folder, ModelConfig model)
    {
        AdapterConfig file = AdapterConfig.Load(folder);
        var config = new LoraConfig
        {
            Rank = file.Rank,
            Alpha = (float)file.Alpha,
            UseRsLora = file.UseRsLora,
            TargetModules = file.AllLinear ? AdapterSites.ModuleNames : file.TargetModules,
        };
        try
        {
            LoraAdapter.Validate(config, model);
            return config;
        }
        catch (RequestRejectedException e)
        {
            throw new InvalidFileException(Path.Combine(folder, AdapterConfig.FileName), "r, target_modules", e.Message, e);
        }
    }

    /// <summary>Reads an adapter for this model.</summary>
    /// <exception cref="InvalidFileException">A malformed file, or an adapter of another model, rank or module set.</exception>
    public static LoraAdapter Load(string folder, LoadedModel model)
    {
        LoraConfig config = ReadConfig(folder, model.Config);
        string weightsPath = Path.Combine(folder, WeightsFileName);
        if (!File.Exists(weightsPath))
        {
            throw new InvalidFileException(weightsPath, "file", "does not exist");
        }

        using SafetensorsFile weights = SafetensorsFile.Open(weightsPath);
        var adapter = new LoraAdapter(model.Backend, model.Config, config);
        try
        {
            CheckNames(weights, adapter);
            foreach (int site in adapter.SiteIndices)
            {
                DeviceLora pair = adapter[site]!;
                model.Backend.Upload(Read(weights, TensorName(site, 'A'), pair.Rank, pair.InFeatures), pair.A);
                float[] b = Read(weights, TensorName(site, 'B'), pair.OutFeatures, pair.Rank);
                model.Backend.Upload(Transpose(b, pair.OutFeatures, pair.Rank), pair.BTransposed);
                model.Backend.RefreshLora(pair);
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
    public static IReadOnlyList<TensorToWrite> Download(LoraAdapter adapter, IComputeBackend backend)
    {
        var tensors = new List<TensorToWrite>();
        foreach (int site in adapter.SiteIndices)
        {
            DeviceLora pair = adapter[site]!;
            float[] a = new float[pair.Rank * pair.InFeatures];
            float[] bTransposed = new float[pair.Rank * pair.OutFeatures];
            backend.Download(pair.A, a);
            backend.Download(pair.BTransposed, bTransposed);
            float[] b = Transpose(bTransposed, pair.Rank, pair.OutFeatures);
            tensors.Add(TensorToWrite.FromFloats(TensorName(site, 'A'), [pair.Rank, pair.InFeatures], a));
            tensors.Add(TensorToWrite.FromFloats(TensorName(site, 'B'), [pair.OutFeatures, pair.Rank], b));
        }

        return tensors;
    }

    /// <summary>Writes a folder that PEFT reads back.</summary>
    public static void Save(
        string folder, LoraConfig config, IReadOnlyList<TensorToWrite> tensors, string? baseModel,
        IReadOnlyDictionary<string, string>? metadata = null)
    {
        Directory.CreateDirectory(folder);
        var all = new Dictionary<string, string>(metadata ?? new Dictionary<string, string>()) { ["format"] = "pt" };
        SafetensorsWriter.Write(Path.Combine(folder, WeightsFileName), tensors, all);
        new AdapterConfig
        {
            Rank = config.Rank,
            Alpha = config.Alpha,
            UseRsLora = config.UseRsLora,
            TargetModules = config.TargetModules,
            BaseModelNameOrPath = baseModel,
        }.Save(folder);
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
    private static void CheckNames(SafetensorsFile weights, LoraAdapter adapter)
    {
        HashSet<string> expected = [.. adapter.SiteIndices.SelectMany(s => new[] { TensorName(s, 'A'), TensorName(s, 'B') })];
        foreach (string name in weights.Tensors.Keys)
        {
            if (!expected.Contains(name))
            {
                throw new InvalidFileException(
                    weights.Path, name, "is not a tensor of this model and adapter_config.json's target_modules");
            }
        }
    }

    private static float[] Read(SafetensorsFile file, string name, int rows, int columns)
    {
        SafetensorsTensor tensor = file.Get(name);
        if (tensor.Shape.Count != 2 || tensor.Shape[0] != rows || tensor.Shape[1] != columns)
        {
            throw new InvalidFileException(
                file.Path, name, $"has shape [{string.Join(", ", tensor.Shape)}]; this model and rank ask for [{rows}, {columns}]");
        }

        float[] values = tensor.ToFloats();
        int bad = Array.FindIndex(values, v => !float.IsFinite(v));
        return bad < 0
            ? values
            : throw new InvalidFileException(file.Path, name, $"holds NaN or infinity at [{bad / columns}, {bad % columns}]");
    }
}
