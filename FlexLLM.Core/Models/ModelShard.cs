using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Graph;
using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;

namespace FlexLLM.Models;

/// <summary>
/// How a model is divided among the ranks of a tensor-parallel group. The backbone is divided as Megatron does (paper section 5.1);
/// embedding, norms and head are on every rank; adapters as their plans say.
/// </summary>
internal sealed class ModelShard
{
    // What plans are compared by: a step's rows, and as many between two optimizer steps. The bypasses of a model hardly depend on it.
    private static readonly PlanTokens Typical = new(PerBatch: 256, PerStep: 256);

    private readonly Dictionary<(BypassNetwork, int, int, BypassTap), BypassPlan> _plans = [];
    private readonly Func<BypassTap, Bypass, BypassPlan> _planOf;

    /// <param name="whole">The model.</param>
    /// <param name="ranks">Degree of the division.</param>
    /// <param name="planOf">Chooses the plan of an adapter's network by its tap; null takes the cheapest.</param>
    /// <exception cref="RequestRejectedException">The degree does not divide the model; the message says which do.</exception>
    public ModelShard(ModelConfig whole, int ranks, Func<BypassTap, Bypass, BypassPlan>? planOf = null)
    {
        Whole = whole;
        Ranks = ranks;
        Local = LocalConfig(whole, ranks);
        _planOf = planOf ?? Cheapest;
    }

    public ModelConfig Whole { get; }

    /// <summary>What one rank has: its share of the heads and of the MLP.</summary>
    public ModelConfig Local { get; }

    public int Ranks { get; }

    /// <summary>The division among a device's ranks; null for a device that is one.</summary>
    /// <exception cref="RequestRejectedException">Their number does not divide the model; the message says which do.</exception>
    public static ModelShard? Of(ModelConfig whole, IComputeBackend backend) =>
        backend is GroupBackend group ? new ModelShard(whole, group.Ranks) : null;

    /// <summary>Degrees that divide the model's heads, key/value heads and inner width, ascending.</summary>
    public static IEnumerable<int> DegreesOf(ModelConfig config) => Enumerable.Range(1, config.KeyValueHeads)
        .Where(p => config.KeyValueHeads % p == 0 && config.AttentionHeads % p == 0 && config.IntermediateSize % p == 0);

    /// <summary>What one rank has of a model: its share of the heads and of the MLP.</summary>
    /// <exception cref="RequestRejectedException">The degree does not divide the model; the message says which do.</exception>
    public static ModelConfig LocalConfig(ModelConfig config, int ranks) => DegreesOf(config).Contains(ranks)
        ? config with
        {
            AttentionHeads = config.AttentionHeads / ranks,
            KeyValueHeads = config.KeyValueHeads / ranks,
            IntermediateSize = config.IntermediateSize / ranks,
        }
        : throw new RequestRejectedException(
            $"A tensor-parallel degree of {ranks} does not divide the model's {config.AttentionHeads} heads, {config.KeyValueHeads} " +
            $"key/value heads and inner width of {config.IntermediateSize}; possible are {string.Join(", ", DegreesOf(config))}.");

    /// <summary>Division of a linear, by the name of its weight or bias.</summary>
    public static LinearDivision DivisionOf(string name)
    {
        for (int module = 0; module < AdapterSites.PerLayer; module++)
        {
            if (name.Contains($".{AdapterSites.ModuleNames[module]}.", StringComparison.Ordinal))
            {
                return AdapterSites.OwnsInput((AdapterModule)module) ? LinearDivision.ByInputs : LinearDivision.ByOutputs;
            }
        }

        return LinearDivision.Replicated;
    }

    /// <summary>The tap of a network at a module.</summary>
    public static BypassTap TapOf(AdapterModule module, BypassAttachment attachment) => attachment switch
    {
        BypassAttachment.Around => AdapterSites.OwnsInput(module) ? BypassTap.RowParallel : BypassTap.ColumnParallel,
        BypassAttachment.Output when AdapterSites.OwnsInput(module) => BypassTap.Replicated,
        _ => BypassTap.SplitHidden,
    };

    /// <summary>The plan of a network at a site; the same for every layer.</summary>
    public BypassPlan PlanOf(int site, BypassNetwork network)
    {
        AdapterModule module = AdapterSites.ModuleOf(site);
        (int tapColumns, int addColumns) = AdapterSites.WidthsOf(module, network.Attachment, Whole);
        BypassTap tap = TapOf(module, network.Attachment);
        var key = (network, tapColumns, addColumns, tap);
        if (!_plans.TryGetValue(key, out BypassPlan? plan))
        {
            plan = _plans[key] = _planOf(tap, network.ToBypass(tapColumns, addColumns));
            Check.That(plan.Tap == tap && plan.Ranks == Ranks);
        }

        return plan;
    }

    /// <summary>The rank's graph of a model with these networks, or with places for them where there are none given.</summary>
    public ParallelGraph Parallelize(ParallelGraph graph, IReadOnlyDictionary<int, BypassNetwork>? networks) =>
        ModelParallelizer.Parallelize(graph, Ranks, DivisionOf, site => PlanOf(site, networks![site]));

    /// <summary>
    /// A rank's part of a weight [rows, columns] of the whole model. A bias that is added to partial sums is zero but on rank 0.
    /// </summary>
    public (Shard Rows, Shard Columns, bool IsZero) PartOf(WeightShape weight, int rank)
    {
        LinearDivision division = DivisionOf(weight.Name);
        return (division, weight.IsVector) switch
        {
            (LinearDivision.ByOutputs, false) => (Shard.Of(weight.Rows, rank, Ranks), Shard.All(weight.Columns), false),
            (LinearDivision.ByOutputs, true) => (Shard.All(1), Shard.Of(weight.Columns, rank, Ranks), false),
            (LinearDivision.ByInputs, false) => (Shard.All(weight.Rows), Shard.Of(weight.Columns, rank, Ranks), false),
            (LinearDivision.ByInputs, true) => (Shard.All(1), Shard.All(weight.Columns), rank > 0),
            _ => (Shard.All(weight.Rows), Shard.All(weight.Columns), false),
        };
    }

    private BypassPlan Cheapest(BypassTap tap, Bypass bypass)
    {
        Planning planning = BypassPlanner.Plan(tap, bypass, Typical, Ranks, MachineModels.Of("a100", bytesPerElement: sizeof(float)));
        return (planning.Choice ?? planning.Plans[0]).Plan;
    }
}
