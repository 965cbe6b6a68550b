using FlexLLM.Adapters;
using FlexLLM.Graph;
using FlexLLM.Graph.Parallelization;
using FlexLLM.Models;

namespace FlexLLM.Finetuning;

/// <summary>A finetuning job on a model that need not be there: what the compiler can tell of it without weights.</summary>
internal sealed record PlannedJob
{
    public required ModelConfig Model { get; init; }

    public required PeftConfig Method { get; init; }

    /// <summary>Length of the sample, in tokens.</summary>
    public int Tokens { get; init; } = 1024;

    /// <summary>Most rows of a forward or backward window.</summary>
    public int Window { get; init; } = 256;

    /// <summary>Tensor-parallel degree. Bytes and flops are those of one rank.</summary>
    public int Ranks { get; init; } = 1;

    /// <summary>Bytes of an element of weights and activations: 2 or 4.</summary>
    public int ElementBytes { get; init; } = 2;

    /// <summary>Keeps saved values in bfloat16 where elements are wider: gradients that are not exact any more.</summary>
    public bool StoresSavedAsBF16 { get; init; }

    /// <summary>Tensors that the optimizer keeps beside each weight: 0, 1 or 2.</summary>
    public int Moments { get; init; } = 2;

    /// <summary>What one rank has of the model: its share of the heads and of the MLP; embedding, norms and head are on all.</summary>
    /// <exception cref="RequestRejectedException">The degree does not divide the model; the message says which do.</exception>
    public ModelConfig LocalModel => ModelShard.LocalConfig(Model, Ranks);

    /// <summary>Refuses what cannot be, and says what could.</summary>
    /// <exception cref="RequestRejectedException">The job does not fit the model, or a number is out of range.</exception>
    public void Validate()
    {
        PeftAdapter.Validate(Method, Model);
        _ = LocalModel;
        Require(Tokens >= 1 && Tokens <= Model.MaxPositions, $"{Tokens} tokens: the model takes 1 to {Model.MaxPositions}");
        Require(Window >= 1, $"a window of {Window} rows: it must be at least 1");
        Require(ElementBytes is 2 or 4, $"{ElementBytes} bytes an element: it must be 2 or 4");
        Require(Moments is >= 0 and <= 2, $"{Moments} moments: an optimizer keeps 0, 1 or 2");
        Require(
            !StoresSavedAsBF16 || ElementBytes == 4,
            "saved values as bfloat16 take no fewer bytes where elements have 2; it needs elements of 4");
    }

    /// <summary>The rank's forward graph, with the networks that the job trains.</summary>
    public ParallelGraph BuildGraph() => DecoderBuilder.BuildTraining(LocalModel, PeftAdapter.NetworksOf(Method, Model));

    /// <summary>
    /// The search for parallel plans of each kind of bypass that the method puts into a layer, with the modules that have it.
    /// </summary>
    /// <param name="machine">What the plans are priced on.</param>
    public IEnumerable<(string Modules, Planning Planning)> PlanBypasses(MachineModel machine)
    {
        var tokens = new PlanTokens(Math.Min(Window, Tokens), Tokens);
        return PeftAdapter.Validate(Method, Model)
            .GroupBy(KindOf, module => AdapterSites.ModuleNames[(int)module])
            .Select(g => (
                string.Join(", ", g),
                BypassPlanner.Plan(g.Key.Tap, g.Key.Network.ToBypass(g.Key.TapColumns, g.Key.AddColumns), tokens, Ranks, machine)));
    }

    private (BypassTap Tap, BypassNetwork Network, int TapColumns, int AddColumns) KindOf(AdapterModule module)
    {
        BypassNetwork network = Method.NetworkOf(module);
        (int tap, int add) = AdapterSites.WidthsOf(module, network.Attachment, Model);
        return (ModelShard.TapOf(module, network.Attachment), network, tap, add);
    }

    private static void Require(bool condition, string fault)
    {
        if (!condition)
        {
            throw new RequestRejectedException($"{char.ToUpperInvariant(fault[0])}{fault[1..]}.");
        }
    }
}
