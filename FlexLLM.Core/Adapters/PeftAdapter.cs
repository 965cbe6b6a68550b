using System.Numerics.Tensors;
using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Graph;
using FlexLLM.Graph.Parallelization;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Adapters;

/// <summary>
/// One trainable tensor on the device: a matrix with the copies that its backend keeps, or a vector [1, n]; on a group of devices each
/// rank has the part that the plan gives it.
/// </summary>
internal sealed class AdapterTensor : IDisposable
{
    private readonly DeviceTensor? _vector;
    private readonly PlanParameter? _division;

    /// <param name="backend">The device.</param>
    /// <param name="whole">The undivided tensor.</param>
    /// <param name="division">How a plan divides it among the ranks of a group; null on one device.</param>
    public AdapterTensor(IComputeBackend backend, BypassWeight whole, PlanParameter? division)
    {
        Whole = whole;
        _division = division;
        Check.That(division is null || backend is GroupBackend);
        Spec = SpecOf(whole, division, (backend as GroupBackend)?.Ranks ?? 1);
        if (whole.IsVector)
        {
            _vector = backend.Allocate(1, Spec.Wide);
        }
        else
        {
            Factor = backend.CreateFactor(Spec.Inner, Spec.Wide);
        }
    }

    /// <summary>Shape of what a rank has, or one device.</summary>
    public BypassWeight Spec { get; }

    /// <summary>Shape of the undivided tensor.</summary>
    public BypassWeight Whole { get; }

    /// <summary>The gradients of all ranks must be summed before an optimizer step.</summary>
    public bool GradientIsPartial => _division is { GradientIsPartial: true };

    /// <summary>The matrix; null for a vector.</summary>
    public DeviceFactor? Factor { get; }

    public DeviceTensor Values => Factor?.Values ?? _vector!;

    public long Bytes => Factor?.Bytes ?? _vector!.Bytes;

    /// <summary>Shape of a rank's part.</summary>
    public static BypassWeight SpecOf(BypassWeight whole, PlanParameter? division, int ranks)
    {
        (Shard inner, Shard wide) = PartOf(whole, division, 0, ranks);
        return whole with { Inner = inner.Count, Wide = wide.Count };
    }

    /// <summary>What such a tensor will hold.</summary>
    public static long BytesOf(IComputeBackend backend, BypassWeight spec) =>
        spec.IsVector ? backend.TensorBytes(1, spec.Wide) : backend.FactorBytes(spec.Inner, spec.Wide);

    /// <summary>Writes the undivided tensor's values, and derived copies.</summary>
    public void Upload(IComputeBackend backend, float[] whole)
    {
        Write(backend, whole, Values);
        Refresh(backend);
    }

    /// <summary>The undivided tensor's values.</summary>
    public float[] Download(IComputeBackend backend) => Read(backend, Values);

    /// <summary>Writes undivided values to a tensor that is divided as this one is: its own, or a moment of an optimizer.</summary>
    public void Write(IComputeBackend backend, float[] whole, DeviceTensor tensor)
    {
        Check.That(whole.Length == Whole.Count);
        if (backend is not GroupBackend group)
        {
            backend.Upload(whole, tensor);
            return;
        }

        float[] part = new float[Spec.Count];
        foreach (GroupRank rank in group.Settle())
        {
            foreach ((int ofWhole, int ofPart) in RowsOf(rank))
            {
                whole.AsSpan(ofWhole, Spec.Wide).CopyTo(part.AsSpan(ofPart));
            }

            rank.Device.Upload(part, rank.Of(tensor));
        }
    }

    /// <summary>The undivided values of a tensor that is divided as this one is.</summary>
    public float[] Read(IComputeBackend backend, DeviceTensor tensor)
    {
        float[] whole = new float[Whole.Count];
        if (backend is not GroupBackend group)
        {
            backend.Download(tensor, whole);
            return whole;
        }

        float[] part = new float[Spec.Count];
        foreach (GroupRank rank in group.Settle())
        {
            rank.Device.Download(rank.Of(tensor), part);
            foreach ((int ofWhole, int ofPart) in RowsOf(rank))
            {
                part.AsSpan(ofPart, Spec.Wide).CopyTo(whole.AsSpan(ofWhole));
            }
        }

        return whole;
    }

    /// <summary>Brings derived copies up to date after the values were written.</summary>
    public void Refresh(IComputeBackend backend)
    {
        if (Factor is not null)
        {
            backend.RefreshFactor(Factor);
        }
    }

    public void Dispose()
    {
        Factor?.Dispose();
        _vector?.Dispose();
    }

    // A plan counts a matrix as [OUT, IN]. A vector has no inner side.
    private static (Shard Inner, Shard Wide) PartOf(BypassWeight whole, PlanParameter? division, int rank, int ranks)
    {
        if (division is null)
        {
            return (Shard.All(whole.Inner), Shard.All(whole.Wide));
        }

        Shard rows = division.RowsOn(rank, ranks);
        Shard columns = division.ColumnsOn(rank, ranks);
        return whole.IsVector ? (Shard.All(0), columns) : whole.Widens ? (columns, rows) : (rows, columns);
    }

    // Where each row of a rank's part begins, in the undivided values and in its own.
    private IEnumerable<(int OfWhole, int OfPart)> RowsOf(GroupRank rank)
    {
        (Shard inner, Shard wide) = PartOf(Whole, _division, rank.Index, rank.Count);
        Check.That(inner.Count == Spec.Inner && wide.Count == Spec.Wide, "parts are of one shape");
        return Enumerable.Range(0, Math.Max(1, inner.Count))
            .Select(row => (((inner.Start + row) * Whole.Wide) + wide.Start, row * wide.Count));
    }
}

/// <summary>
/// An adapter's network at one site: where it stands, how it runs, and its tensors in the network's order. LoRA runs in one call
/// for many adapters, unless ranks must talk inside it.
/// </summary>
internal sealed record AdapterSite(
    BypassNetwork Network, BypassAttachment Attachment, BypassProgram Program, bool IsLora, IReadOnlyList<AdapterTensor> Tensors);

/// <summary>
/// The weights of one adapter on the device, a network a site. A published version never changes; the copy that a finetuning job
/// trains is its own.
/// </summary>
internal sealed class PeftAdapter : IDisposable
{
    private readonly ModelConfig _model;
    private readonly ModelShard? _shard;
    private readonly AdapterSite?[] _sites;
    private readonly ResourceSet _tensors = new();

    /// <summary>An adapter of zeros. The config must have passed <see cref="Validate"/>.</summary>
    /// <param name="backend">The device.</param>
    /// <param name="model">Shape of the whole model.</param>
    /// <param name="config">Method and modules.</param>
    /// <param name="shard">How the model is divided among the ranks of a group; null on one device.</param>
    public PeftAdapter(IComputeBackend backend, ModelConfig model, PeftConfig config, ModelShard? shard = null)
    {
        (_model, _shard) = (model, shard);

        // The caller may go on changing its list.
        Config = config with { TargetModules = [.. config.TargetModules] };
        Modules = Validate(Config, model);
        Networks = NetworksOf(Config, model);
        SiteIndices = new SortedSet<int>(Networks.Keys);
        _sites = new AdapterSite?[model.LayerCount * AdapterSites.PerLayer];
        var programs = new Dictionary<(BypassNetwork, BypassPlan?, int, int), BypassProgram>();
        try
        {
            foreach (int site in SiteIndices)
            {
                BypassNetwork network = Networks[site];
                (int tap, int add) = AdapterSites.WidthsOf(AdapterSites.ModuleOf(site), network.Attachment, model);
                BypassPlan? plan = shard?.PlanOf(site, network);
                if (!programs.TryGetValue((network, plan, tap, add), out BypassProgram? program))
                {
                    programs.Add((network, plan, tap, add), program = BypassLowering.Lower(network, tap, add, plan));
                }

                bool isReduced = plan is not null && plan.Tap == BypassTap.RowParallel && plan.Add.Layout == TensorLayout.Replicated;
                _sites[site] = new AdapterSite(
                    network,
                    isReduced ? BypassAttachment.AroundReduced : network.Attachment,
                    program,
                    network.IsLora && program.Steps.All(s => s.Op is OpKind.Narrow or OpKind.Widen or OpKind.Add),
                    [.. network.Weights(tap, add).Select((w, i) => _tensors.Add(new AdapterTensor(backend, w, plan?.Parameters[i])))]);
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public PeftConfig Config { get; }

    public IReadOnlyCollection<AdapterModule> Modules { get; }

    /// <summary>The network of each site: what a job's graph is built from.</summary>
    public IReadOnlyDictionary<int, BypassNetwork> Networks { get; }

    /// <summary>Sites with a network, ascending.</summary>
    public IReadOnlySet<int> SiteIndices { get; }

    public float Scale => Config.Scale;

    public long Bytes => Tensors().Sum(t => t.Tensor.Bytes);

    /// <summary>The network at a site, or null where this adapter has none.</summary>
    public AdapterSite? this[int site] => _sites[site];

    /// <summary>Every tensor with its site, in a fixed order.</summary>
    public IEnumerable<(int Site, AdapterTensor Tensor)> Tensors() =>
        SiteIndices.SelectMany(site => _sites[site]!.Tensors.Select(tensor => (site, tensor)));

    /// <summary>The networks that a valid config puts into a model, by site.</summary>
    public static IReadOnlyDictionary<int, BypassNetwork> NetworksOf(PeftConfig config, ModelConfig model) =>
        AdapterSites.Of(model.LayerCount, Validate(config, model))
            .ToDictionary(site => site, site => config.NetworkOf(AdapterSites.ModuleOf(site)));

    /// <summary>Every tensor that an adapter of a valid config has; of a divided model, a rank's part of it.</summary>
    public static IEnumerable<BypassWeight> WeightsOf(PeftConfig config, ModelConfig model, ModelShard? shard = null) =>
        NetworksOf(config, model).OrderBy(n => n.Key).SelectMany(n =>
        {
            (int tap, int add) = AdapterSites.WidthsOf(AdapterSites.ModuleOf(n.Key), n.Value.Attachment, model);
            BypassPlan? plan = shard?.PlanOf(n.Key, n.Value);
            return n.Value.Weights(tap, add).Select((w, i) => AdapterTensor.SpecOf(w, plan?.Parameters[i], shard?.Ranks ?? 1));
        });

    /// <summary>A new adapter, initialised as PEFT does. It answers like the bare model.</summary>
    public static PeftAdapter CreateRandom(
        IComputeBackend backend, ModelConfig model, PeftConfig config, ulong seed, ModelShard? shard = null)
    {
        var adapter = new PeftAdapter(backend, model, config, shard);
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
    public PeftAdapter Copy(IComputeBackend backend)
    {
        var copy = new PeftAdapter(backend, _model, Config, _shard);
        try
        {
            copy.CopyFrom(this, backend);
            backend.Synchronize(); // What fails, fails before anybody has the copy.
            return copy;
        }
        catch
        {
            copy.Dispose();
            throw;
        }
    }

    /// <summary>Every tensor as its network says; every site has its own random stream.</summary>
    public void InitializeRandom(IComputeBackend backend, ulong seed)
    {
        foreach (int site in SiteIndices)
        {
            var random = new SeededRandom(seed ^ ((ulong)(site + 1) * 0x9E3779B97F4A7C15));
            foreach (AdapterTensor tensor in _sites[site]!.Tensors)
            {
                tensor.Upload(backend, InitialValues(tensor.Whole, ref random));
            }
        }
    }

    /// <summary>Makes these weights equal to another adapter's of the same config.</summary>
    public void CopyFrom(PeftAdapter other, IComputeBackend backend)
    {
        foreach (((int site, AdapterTensor target), (int otherSite, AdapterTensor source)) in Tensors().Zip(other.Tensors()))
        {
            Check.That(site == otherSite && target.Spec == source.Spec);
            backend.Copy(source.Values, target.Values);
            target.Refresh(backend);
        }
    }

    /// <summary>False when a weight is NaN or infinite.</summary>
    public bool IsFinite(IComputeBackend backend) =>
        Tensors().All(t => float.IsFinite(TensorPrimitives.MaxMagnitude<float>(t.Tensor.Download(backend))));

    public void Dispose() => _tensors.Dispose();

    /// <summary>
    /// The modules that a config names. Throws <see cref="RequestRejectedException"/> for a config that does not fit.
    /// </summary>
    public static IReadOnlyCollection<AdapterModule> Validate(PeftConfig config, ModelConfig model)
    {
        string property = $"{config.GetType().Name}.TargetModules";
        string known = string.Join(", ", AdapterSites.ModuleNames);
        if (config.TargetModules is null || config.TargetModules.Count == 0)
        {
            throw new RequestRejectedException($"{property} is empty: name at least one of {known}.");
        }

        var modules = new SortedSet<AdapterModule>();
        foreach (string name in config.TargetModules)
        {
            AdapterModule module = AdapterSites.Parse(name) ??
                throw new RequestRejectedException($"{property}: '{name}' is not a module of this model; known are {known}.");
            if (!modules.Add(module))
            {
                throw new RequestRejectedException($"{property}: '{name}' is named twice.");
            }

            config.ValidateAt(module, model);
        }

        return modules;
    }

    private static float[] InitialValues(BypassWeight spec, ref SeededRandom random)
    {
        float[] values = new float[spec.Count];
        float bound = 1f / MathF.Sqrt(spec.Wide);
        for (int i = 0; i < values.Length; i++)
        {
            values[i] = spec.Initialization switch
            {
                BypassInitialization.One => 1,
                BypassInitialization.KaimingUniform => ((2f * random.NextSingle()) - 1f) * bound,
                _ => 0,
            };
        }

        return values;
    }
}
