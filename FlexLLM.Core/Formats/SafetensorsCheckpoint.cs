using System.Text.Json;

namespace FlexLLM.Formats;

/// <summary>
/// The weights of a model folder: model.safetensors, or the shards that model.safetensors.index.json names. Tensors that the
/// index does not list are not part of the checkpoint.
/// </summary>
internal sealed class SafetensorsCheckpoint : IDisposable
{
    /// <summary>Name of the file of an unsharded checkpoint.</summary>
    public const string SingleFileName = "model.safetensors";

    /// <summary>Name of the file that lists the shards.</summary>
    public const string IndexFileName = "model.safetensors.index.json";

    /// <summary>Most shards of one checkpoint.</summary>
    public const int ShardsMax = 4096;

    private readonly string _path;
    private readonly List<SafetensorsFile> _files = [];
    private readonly Dictionary<string, SafetensorsTensor> _tensors = [];

    private SafetensorsCheckpoint(string path) => _path = path;

    /// <summary>Names of all tensors.</summary>
    public IReadOnlyCollection<string> Names => _tensors.Keys;

    /// <summary>Opens the checkpoint of a folder; the single file wins where both forms are there, as in transformers.</summary>
    /// <exception cref="InvalidFileException">No checkpoint, or a malformed one.</exception>
    public static SafetensorsCheckpoint Open(string folder)
    {
        string single = Path.Combine(folder, SingleFileName);
        string index = Path.Combine(folder, IndexFileName);
        bool isSharded = !File.Exists(single);
        if (isSharded && !File.Exists(index))
        {
            throw new InvalidFileException(folder, "weights", $"neither {SingleFileName} nor {IndexFileName} is in the folder");
        }

        var checkpoint = new SafetensorsCheckpoint(isSharded ? index : single);
        try
        {
            if (isSharded)
            {
                checkpoint.OpenShards(folder);
            }
            else
            {
                checkpoint._files.Add(SafetensorsFile.Open(single));
                foreach (SafetensorsTensor tensor in checkpoint._files[0].Tensors.Values)
                {
                    checkpoint._tensors.Add(tensor.Name, tensor);
                }
            }

            return checkpoint;
        }
        catch
        {
            checkpoint.Dispose();
            throw;
        }
    }

    public bool Contains(string name) => _tensors.ContainsKey(name);

    /// <summary>The tensor of that name.</summary>
    /// <exception cref="InvalidFileException">The checkpoint has no such tensor.</exception>
    public SafetensorsTensor Get(string name) =>
        _tensors.GetValueOrDefault(name) ?? throw new InvalidFileException(_path, name, "tensor is missing");

    public void Dispose()
    {
        foreach (SafetensorsFile file in _files)
        {
            file.Dispose();
        }
    }

    private void OpenShards(string folder)
    {
        var root = new JsonFields(JsonFile.Load(_path, SafetensorsHeader.BytesMax), _path);
        JsonFields map = root.OptionalObject("weight_map") ?? throw root.Missing("weight_map");
        if (map.Element.GetPropertyCount() > SafetensorsHeader.TensorsMax)
        {
            throw root.Fault("weight_map", $"has more than {SafetensorsHeader.TensorsMax} tensors");
        }

        var shardOfTensor = new Dictionary<string, string>();
        foreach (JsonProperty property in map.Element.EnumerateObject())
        {
            shardOfTensor.Add(property.Name, property.Value.ValueKind == JsonValueKind.String
                ? CheckShardName(property.Name, property.Value.GetString()!)
                : throw map.Fault(property.Name, $"must be a file name, not {JsonFields.Kind(property.Value)}"));
        }

        string[] names = [.. shardOfTensor.Values.Distinct()];
        if (names.Length > ShardsMax)
        {
            throw root.Fault("weight_map", $"names {names.Length} shards; at most {ShardsMax} are read");
        }

        var ownerOfTensor = new Dictionary<string, string>();
        foreach (string name in names)
        {
            OpenShard(folder, name, shardOfTensor, ownerOfTensor);
        }

        foreach ((string tensor, string shard) in shardOfTensor)
        {
            if (!_tensors.ContainsKey(tensor))
            {
                throw map.Fault(tensor, $"is not in its shard {shard}");
            }
        }
    }

    private void OpenShard(
        string folder, string name, Dictionary<string, string> shardOfTensor, Dictionary<string, string> ownerOfTensor)
    {
        string path = Path.Combine(folder, name);
        if (!File.Exists(path))
        {
            throw new InvalidFileException(_path, "weight_map", $"shard {name} does not exist");
        }

        SafetensorsFile file = SafetensorsFile.Open(path);
        _files.Add(file);
        foreach (SafetensorsTensor tensor in file.Tensors.Values)
        {
            if (!ownerOfTensor.TryAdd(tensor.Name, name))
            {
                throw new InvalidFileException(
                    path, tensor.Name, $"tensor is in two shards, {ownerOfTensor[tensor.Name]} and {name}");
            }

            if (shardOfTensor.GetValueOrDefault(tensor.Name) == name)
            {
                _tensors.Add(tensor.Name, tensor);
            }
        }
    }

    // A shard is a file of this folder: the index must not lead anywhere else.
    private string CheckShardName(string tensor, string name) =>
        name.EndsWith(".safetensors", StringComparison.Ordinal) && name.AsSpan().IndexOfAny("/\\:\0") < 0
            ? name
            : throw new InvalidFileException(
                _path,
                $"weight_map.{tensor}",
                $"{JsonFile.Quote(name)} is not the plain name of a .safetensors file in this folder");
}
