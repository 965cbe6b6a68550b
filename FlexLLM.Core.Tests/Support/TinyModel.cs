using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Formats;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Support;

/// <summary>
/// A random checkpoint of ragged sizes in a folder of its own, gone with it: widths that are no multiple of a vector, grouped
/// heads, a head size that does not divide the hidden size (Qwen3), a tied head (Qwen2).
/// </summary>
internal sealed class TinyModel : IDisposable
{
    /// <summary>Rows of the head. With a tokenizer the ids from 259 on are padding that no token has.</summary>
    public const int Vocabulary = 300;

    /// <summary>Ids of the byte-level tokenizer: bytes, then three special tokens.</summary>
    public const int TokenizerSize = 259;

    /// <summary>The end token of config.json; the tokenizer's is 258.</summary>
    public const int Eos = 299;

    private readonly DirectoryInfo _root = Directory.CreateTempSubdirectory("flexllm-engine-");

    /// <param name="architecture">Family.</param>
    /// <param name="withTokenizer">Byte-level tokenizer with the ChatML template.</param>
    /// <param name="seed">Seed of the weights.</param>
    /// <param name="layers">Decoder layers.</param>
    public TinyModel(ModelArchitecture architecture, bool withTokenizer = false, ulong seed = 5, int layers = 2)
    {
        Config = ConfigOf(architecture, layers);
        RandomCheckpoint.Write(Folder, Config, DType.F32, seed, deviation: 0.15f);
        if (!withTokenizer)
        {
            File.Delete(Path.Combine(Folder, "tokenizer.json"));
            File.Delete(Path.Combine(Folder, "tokenizer_config.json"));
        }
    }

    public ModelConfig Config { get; }

    /// <summary>The checkpoint.</summary>
    public string Folder => this["model"];

    /// <summary>A path beside the checkpoint.</summary>
    public string this[string name] => Path.Combine(_root.FullName, name);

    public static ModelConfig ConfigOf(ModelArchitecture architecture, int layers = 2) => new()
    {
        Architecture = architecture,
        HiddenSize = architecture == ModelArchitecture.Qwen2 ? 56 : 48,
        IntermediateSize = 100,
        LayerCount = layers,
        AttentionHeads = 4,
        KeyValueHeads = architecture == ModelArchitecture.Qwen2 ? 1 : 2,
        HeadDim = architecture switch { ModelArchitecture.Llama => 12, ModelArchitecture.Qwen2 => 14, _ => 18 },
        VocabularySize = Vocabulary,
        MaxPositions = 256,
        TieWordEmbeddings = architecture == ModelArchitecture.Qwen2,
        EosTokenIds = [Eos],
    };

    /// <summary>Random token ids that are neither special nor padding.</summary>
    public static int[] Ids(int count, ulong seed)
    {
        var random = new SeededRandom(seed);
        return [.. Enumerable.Range(0, count).Select(_ => random.Next(256))];
    }

    /// <summary>Writes a PEFT folder whose A and B are both random, so that the adapter answers unlike the bare model.</summary>
    public string WriteAdapter(string name, LoraConfig lora, ulong seed, float deviation = 0.2f)
    {
        var random = new SeededRandom(seed);
        var tensors = new List<TensorToWrite>();
        foreach (int site in AdapterSites.Of(Config.LayerCount, PeftAdapter.Validate(lora, Config)))
        {
            (int inFeatures, int outFeatures) = AdapterSites.WidthsOf(AdapterSites.ModuleOf(site), Config);
            tensors.Add(Random(PeftFolder.TensorName(site, 'A'), lora.Rank, inFeatures));
            tensors.Add(Random(PeftFolder.TensorName(site, 'B'), outFeatures, lora.Rank));
        }

        PeftFolder.Save(this[name], lora, tensors, baseModel: null);
        return this[name];

        TensorToWrite Random(string tensor, int rows, int columns)
        {
            float[] values = new float[rows * columns];
            for (int i = 0; i < values.Length; i++)
            {
                values[i] = (float)random.NextGaussian() * deviation;
            }

            return TensorToWrite.FromFloats(tensor, [rows, columns], values);
        }
    }

    /// <summary>The time that an engine measures at most if nobody says, with a model as fast as this.</summary>
    public static TimeSpan ProfilingTime { get; } = TimeSpan.FromSeconds(2);

    /// <summary>The model without an engine.</summary>
    public LoadedModel Load(IComputeBackend backend)
    {
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(Folder);
        return LoadedModel.Load(checkpoint, Config, backend, null, Config.MaxPositions);
    }

    /// <summary>
    /// An engine on one thread; options may change everything but the device where it is given here. It measures no speed while it
    /// loads unless they give the time: that would take longer than all that most tests do with an engine.
    /// </summary>
    public Task<CoServingEngine> StartAsync(CoServingOptions? options = null, ComputeDevice? device = null)
    {
        options ??= new CoServingOptions();
        return CoServingEngine.LoadAsync(Folder, options with
        {
            Device = device ?? TestDevice.Of(),
            ProfilingTimeMax = options.ProfilingTimeMax ?? TimeSpan.Zero,
        }).Soon();
    }

    public void Dispose() => _root.Delete(recursive: true);
}

/// <summary>
/// A device whose backend tells the name of each call before it is made. The probe may wait, or throw in its place.
/// </summary>
internal sealed class ProbedDevice(Action<string> probe, int threads = 1) : ComputeDevice
{
    /// <summary>The backend of the last engine that was loaded on this device.</summary>
    public IComputeBackend? Backend { get; private set; }

    internal override IComputeBackend CreateBackend() => Backend = new ProbedBackend(TestDevice.CreateBackend(threads), probe);
}

/// <summary>The device of one rank of a group, which calls a probe before each operation where there is one.</summary>
internal sealed class RankDevice(int rank, Action<int, string>? probe) : ComputeDevice
{
    /// <summary>A group of so many ranks, on the devices that the tests run on.</summary>
    public static ComputeDevice Group(int ranks, Action<int, string>? probe = null) =>
        Group([.. Enumerable.Range(0, ranks).Select(rank => new RankDevice(rank, probe))]);

    internal override IComputeBackend CreateBackend()
    {
        IComputeBackend backend = TestDevice.CreateRank(rank);
        return probe is null ? backend : new ProbedBackend(backend, name => probe(rank, name));
    }
}
