using System.Numerics.Tensors;
using FlexLLM.Backends;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Adapters;

/// <summary>
/// The weights of one adapter on the device, one LoRA pair a site. A published version never changes; the copy that a
/// finetuning job trains is its own.
/// </summary>
internal sealed class LoraAdapter : IDisposable
{
    private readonly DeviceLora?[] _sites;
    private readonly ResourceSet _pairs = new();

    /// <summary>An adapter of zeros. The config must have passed <see cref="Validate"/>.</summary>
    public LoraAdapter(IComputeBackend backend, ModelConfig model, LoraConfig config)
    {
        // The caller may go on changing its list.
        Config = config with { TargetModules = [.. config.TargetModules] };
        Modules = Validate(Config, model);
        _sites = new DeviceLora?[model.LayerCount * AdapterSites.PerLayer];
        SiteIndices = AdapterSites.Of(model.LayerCount, Modules);
        try
        {
            foreach (int site in SiteIndices)
            {
                (int inFeatures, int outFeatures) = AdapterSites.WidthsOf(AdapterSites.ModuleOf(site), model);
                _sites[site] = _pairs.Add(backend.CreateLora(inFeatures, outFeatures, config.Rank));
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public LoraConfig Config { get; }

    public IReadOnlyCollection<AdapterModule> Modules { get; }

    /// <summary>Sites with a pair, ascending.</summary>
    public IReadOnlySet<int> SiteIndices { get; }

    public float Scale => Config.Scale;

    public long Bytes => _sites.Sum(s => s?.Bytes ?? 0);

    /// <summary>The pair at a site, or null where this adapter has no bypass.</summary>
    public DeviceLora? this[int site] => _sites[site];

    /// <summary>Shapes [inner, wide] of the matrices of such an adapter, A and B of each site in turn.</summary>
    public static IEnumerable<(int Inner, int Wide)> FactorShapes(ModelConfig model, LoraConfig config)
    {
        foreach (int site in AdapterSites.Of(model.LayerCount, Validate(config, model)))
        {
            (int inFeatures, int outFeatures) = AdapterSites.WidthsOf(AdapterSites.ModuleOf(site), model);
            yield return (config.Rank, inFeatures);
            yield return (config.Rank, outFeatures);
        }
    }

    /// <summary>The largest rank that any module of this model takes.</summary>
    public static int RankMaxOf(ModelConfig model) => Enum.GetValues<AdapterModule>().Max(module => RankMaxOf(module, model));

    /// <summary>A new adapter, initialised as PEFT does. It answers like the bare model.</summary>
    public static LoraAdapter CreateRandom(IComputeBackend backend, ModelConfig model, LoraConfig config, ulong seed)
    {
        var adapter = new LoraAdapter(backend, model, config);
        try
        {
            adapter.InitializeRandom(backend, seed);
            return adapter;
        }
        catch
        {
            adapter.Dispose();
            throw;
        }
    }

    /// <summary>A copy with weights of its own.</summary>
    public LoraAdapter Copy(IComputeBackend backend, ModelConfig model)
    {
        var copy = new LoraAdapter(backend, model, Config);
        try
        {
            copy.CopyFrom(this, backend);
            return copy;
        }
        catch
        {
            copy.Dispose();
            throw;
        }
    }

    /// <summary>
    /// PEFT's initialisation: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero; every site has its own stream.
    /// </summary>
    public void InitializeRandom(IComputeBackend backend, ulong seed)
    {
        foreach (int site in SiteIndices)
        {
            DeviceLora pair = _sites[site]!;
            var random = new SeededRandom(seed ^ ((ulong)(site + 1) * 0x9E3779B97F4A7C15));
            float bound = 1f / MathF.Sqrt(pair.InFeatures);
            float[] a = new float[pair.Rank * pair.InFeatures];
            for (int i = 0; i < a.Length; i++)
            {
                a[i] = ((2f * random.NextSingle()) - 1f) * bound;
            }

            backend.Upload(a, pair.A);
            backend.Zero(pair.BTransposed);
            backend.RefreshLora(pair);
        }
    }

    /// <summary>Makes these weights equal to another adapter's of the same config.</summary>
    public void CopyFrom(LoraAdapter other, IComputeBackend backend)
    {
        Check.That(other._sites.Length == _sites.Length && other.Config.Rank == Config.Rank);
        foreach (int site in SiteIndices)
        {
            DeviceLora source = other._sites[site]!;
            DeviceLora target = _sites[site]!;
            backend.Copy(source.A, target.A);
            backend.Copy(source.BTransposed, target.BTransposed);
            backend.RefreshLora(target);
        }
    }

    /// <summary>False when a weight is NaN or infinite.</summary>
    public bool IsFinite(IComputeBackend backend)
    {
        float[] values = [];
        foreach (DeviceTensor tensor in SiteIndices.SelectMany(s => new[] { _sites[s]!.A, _sites[s]!.BTransposed }))
        {
            int count = tensor.Rows * tensor.Columns;
            values = values.Length < count ? new float[count] : values;
            backend.Download(tensor, values.AsSpan(0, count));
            if (!float.IsFinite(TensorPrimitives.MaxMagnitude<float>(values.AsSpan(0, count))))
            {
                return false;
            }
        }

        return true;
    }

    public void Dispose() => _pairs.Dispose();

    /// <summary>
    /// The modules that a config names. Throws <see cref="RequestRejectedException"/> for a config that does not fit.
    /// </summary>
    public static IReadOnlyCollection<AdapterModule> Validate(LoraConfig config, ModelConfig model)
    {
        string known = string.Join(", ", AdapterSites.ModuleNames);
        if (config.TargetModules is null || config.TargetModules.Count == 0)
        {
            throw new RequestRejectedException($"LoraConfig.TargetModules is empty: name at least one of {known}.");
        }

        var modules = new SortedSet<AdapterModule>();
        foreach (string name in config.TargetModules)
        {
            AdapterModule module = AdapterSites.Parse(name) ??
                throw new RequestRejectedException($"LoraConfig.TargetModules: '{name}' is not a module of this model; known are {known}.");
            if (!modules.Add(module))
            {
                throw new RequestRejectedException($"LoraConfig.TargetModules: '{name}' is named twice.");
            }

            int widest = RankMaxOf(module, model);
            if (config.Rank < 1 || config.Rank > widest)
            {
                throw new RequestRejectedException($"LoraConfig.Rank is {config.Rank}; for {name} of this model it must be 1 to {widest}.");
            }
        }

        if (!float.IsFinite(config.Alpha) || config.Alpha <= 0)
        {
            throw new RequestRejectedException($"LoraConfig.Alpha is {config.Alpha}; it must be a positive number.");
        }

        return modules;
    }

    private static int RankMaxOf(AdapterModule module, ModelConfig model)
    {
        (int inFeatures, int outFeatures) = AdapterSites.WidthsOf(module, model);
        return Math.Min(LoraConfig.RankMax, Math.Min(inFeatures, outFeatures));
    }
}
