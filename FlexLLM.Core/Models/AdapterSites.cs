using FlexLLM.Graph;
using FlexLLM.Primitives;

namespace FlexLLM.Models;

/// <summary>The linear modules of a decoder layer that an adapter may target, in the order of the layer.</summary>
internal enum AdapterModule
{
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

/// <summary>A site is one module of one layer, numbered layer * 7 + module: where a bypass attaches.</summary>
internal static class AdapterSites
{
    public const int PerLayer = 7;

    private static readonly string[] Names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    /// <summary>PEFT's names of the modules.</summary>
    public static IReadOnlyList<string> ModuleNames => Names;

    public static int IndexOf(int layer, AdapterModule module) => (layer * PerLayer) + (int)module;

    public static AdapterModule ModuleOf(int site) => (AdapterModule)(site % PerLayer);

    public static int LayerOf(int site) => site / PerLayer;

    /// <summary>Whether the module alone reads its input, so that a bypass may change that input.</summary>
    public static bool OwnsInput(AdapterModule module) => module is AdapterModule.OProj or AdapterModule.DownProj;

    /// <summary>Path of the module inside its layer, for example self_attn.q_proj.</summary>
    public static string PathOf(AdapterModule module) =>
        (module <= AdapterModule.OProj ? "self_attn." : "mlp.") + Names[(int)module];

    /// <summary>Full name as in the checkpoint, for example model.layers.3.mlp.down_proj.</summary>
    public static string NameOf(int site) => $"model.layers.{LayerOf(site)}.{PathOf(ModuleOf(site))}";

    /// <summary>The module of that name, or null.</summary>
    public static AdapterModule? Parse(string name)
    {
        int index = Array.IndexOf(Names, name);
        return index < 0 ? null : (AdapterModule)index;
    }

    /// <summary>Every site of the given modules.</summary>
    public static IReadOnlySet<int> Of(int layers, IReadOnlyCollection<AdapterModule> modules)
    {
        Check.That(modules.Count > 0);
        return new SortedSet<int>(Enumerable.Range(0, layers).SelectMany(l => modules.Select(m => IndexOf(l, m))));
    }

    /// <summary>Every site of the model.</summary>
    public static IReadOnlySet<int> All(int layers) => Of(layers, Enum.GetValues<AdapterModule>());

    /// <summary>Input and output width of a module.</summary>
    public static (int InFeatures, int OutFeatures) WidthsOf(AdapterModule module, ModelConfig config)
    {
        int hidden = config.HiddenSize;
        int query = config.AttentionHeads * config.HeadDim;
        int kv = config.KeyValueHeads * config.HeadDim;
        return module switch
        {
            AdapterModule.QProj => (hidden, query),
            AdapterModule.KProj or AdapterModule.VProj => (hidden, kv),
            AdapterModule.OProj => (query, hidden),
            AdapterModule.DownProj => (config.IntermediateSize, hidden),
            _ => (hidden, config.IntermediateSize),
        };
    }

    /// <summary>Widths of the value that a bypass reads at a module and of the value that it is added to.</summary>
    public static (int Tap, int Add) WidthsOf(AdapterModule module, BypassAttachment attachment, ModelConfig config)
    {
        (int inFeatures, int outFeatures) = WidthsOf(module, config);
        return attachment switch
        {
            BypassAttachment.Around => (inFeatures, outFeatures),
            BypassAttachment.Output => (outFeatures, outFeatures),
            _ => (inFeatures, inFeatures),
        };
    }
}
