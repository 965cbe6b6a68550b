using FlexLLM.Graph;
using FlexLLM.Models;

namespace FlexLLM;

/// <summary>
/// A parameter-efficient finetuning method and the modules it attaches to, the same in every layer: <see cref="LoraConfig"/>,
/// <see cref="SerialAdapterConfig"/> or <see cref="Ia3Config"/>.
/// </summary>
public abstract record PeftConfig
{
    private protected PeftConfig()
    {
    }

    /// <summary>All seven linear modules of a layer, for <see cref="TargetModules"/>.</summary>
    public static IReadOnlyList<string> AllModules => AdapterSites.ModuleNames;

    /// <summary>Any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.</summary>
    public abstract IReadOnlyList<string> TargetModules { get; init; }

    /// <summary>The factor applied to the bypass.</summary>
    public virtual float Scale => 1;

    /// <summary>Method, size and modules in words.</summary>
    public sealed override string ToString() => Describe();

    /// <summary>The network that the method puts at a module.</summary>
    internal abstract BypassNetwork NetworkOf(AdapterModule module);

    /// <summary>Checks all but the names of the modules. Throws <see cref="RequestRejectedException"/>.</summary>
    internal abstract void ValidateAt(AdapterModule module, ModelConfig model);

    /// <summary>What an adapter of this config looks like, for errors.</summary>
    internal abstract string Describe();

    /// <summary>Throws <see cref="RequestRejectedException"/> naming the property when the condition does not hold.</summary>
    private protected void Require(bool condition, string property, string rule)
    {
        if (!condition)
        {
            throw new RequestRejectedException($"{GetType().Name}.{property} {rule}.");
        }
    }
}

/// <summary>LoRA: y += scale * (x A^T) B^T at every target module of every layer.</summary>
public sealed record LoraConfig : PeftConfig
{
    /// <summary>Greatest rank that the engine takes.</summary>
    public const int RankMax = 256;

    /// <summary>Rank r of the bypass, 1 to <see cref="RankMax"/>.</summary>
    /// <value>8.</value>
    public int Rank { get; init; } = 8;

    /// <summary>PEFT's lora_alpha. The scale is alpha / r, or alpha / sqrt(r) with <see cref="UseRsLora"/>.</summary>
    /// <value>16.</value>
    public float Alpha { get; init; } = 16;

    /// <summary>Rank-stabilised scale, alpha / sqrt(r).</summary>
    public bool UseRsLora { get; init; }

    /// <inheritdoc/>
    /// <value>q_proj and v_proj, as PEFT does for LLaMA and Qwen.</value>
    public override IReadOnlyList<string> TargetModules { get; init; } = ["q_proj", "v_proj"];

    /// <inheritdoc/>
    public override float Scale => UseRsLora ? Alpha / MathF.Sqrt(Rank) : Alpha / Rank;

    internal override BypassNetwork NetworkOf(AdapterModule module) => new LoraNetwork(Rank);

    internal override void ValidateAt(AdapterModule module, ModelConfig model)
    {
        int widest = RankMaxAt(module, model);
        string name = AdapterSites.ModuleNames[(int)module];
        Require(Rank >= 1 && Rank <= widest, nameof(Rank), $"is {Rank}; for {name} of this model it must be 1 to {widest}");
        Require(float.IsFinite(Alpha) && Alpha > 0, nameof(Alpha), $"is {Alpha}; it must be a positive number");
    }

    /// <summary>Greatest rank that any module of a model takes.</summary>
    internal static int RankMaxOf(ModelConfig model) => Enum.GetValues<AdapterModule>().Max(m => RankMaxAt(m, model));

    private static int RankMaxAt(AdapterModule module, ModelConfig model)
    {
        (int inFeatures, int outFeatures) = AdapterSites.WidthsOf(module, model);
        return Math.Min(RankMax, Math.Min(inFeatures, outFeatures));
    }

    internal override string Describe() => $"LoRA rank {Rank}, scale {Scale}, modules {string.Join(", ", TargetModules)}";
}

/// <summary>Activation inside a serial Adapter.</summary>
public enum AdapterActivation
{
    /// <summary>max(x, 0).</summary>
    Relu,

    /// <summary>x * sigmoid(x).</summary>
    Silu,
}

/// <summary>
/// Serial Adapter (Houlsby et al. 2019): y += act(y D^T + b1) U + b2 on the output of every target module of every layer.
/// </summary>
public sealed record SerialAdapterConfig : PeftConfig
{
    /// <summary>Greatest size that the engine takes.</summary>
    public const int SizeMax = 1024;

    /// <summary>Width of the bottleneck, 1 to <see cref="SizeMax"/>.</summary>
    /// <value>64.</value>
    public int Size { get; init; } = 64;

    /// <summary>Activation of the bottleneck.</summary>
    public AdapterActivation Activation { get; init; }

    /// <inheritdoc/>
    /// <value>o_proj and down_proj: the outputs of attention and of the MLP.</value>
    public override IReadOnlyList<string> TargetModules { get; init; } = ["o_proj", "down_proj"];

    internal override BypassNetwork NetworkOf(AdapterModule module) =>
        new SerialAdapterNetwork(Size, Activation == AdapterActivation.Silu);

    internal override void ValidateAt(AdapterModule module, ModelConfig model)
    {
        int widest = SizeMaxAt(module, model);
        string name = AdapterSites.ModuleNames[(int)module];
        Require(Size >= 1 && Size <= widest, nameof(Size), $"is {Size}; for {name} of this model it must be 1 to {widest}");
        Require(Enum.IsDefined(Activation), nameof(Activation), $"is {Activation}; it must be Relu or Silu");
    }

    /// <summary>Greatest size that any module of a model takes.</summary>
    internal static int SizeMaxOf(ModelConfig model) => Enum.GetValues<AdapterModule>().Max(m => SizeMaxAt(m, model));

    private static int SizeMaxAt(AdapterModule module, ModelConfig model) =>
        Math.Min(SizeMax, AdapterSites.WidthsOf(module, model).OutFeatures);

    internal override string Describe() =>
        $"serial Adapter size {Size}, {Activation}, modules {string.Join(", ", TargetModules)}";
}

/// <summary>
/// (IA)^3 (Liu et al. 2022): multiplies values of every layer, element by element, with trained vectors that start at one: the
/// outputs of the target modules, and of <see cref="FeedforwardModules"/> the inputs.
/// </summary>
public sealed record Ia3Config : PeftConfig
{
    /// <inheritdoc/>
    /// <value>k_proj, v_proj and down_proj, as PEFT does for LLaMA.</value>
    public override IReadOnlyList<string> TargetModules { get; init; } = ["k_proj", "v_proj", "down_proj"];

    /// <summary>Target modules whose input is scaled instead of the output: o_proj or down_proj.</summary>
    /// <value>down_proj.</value>
    public IReadOnlyList<string> FeedforwardModules { get; init; } = ["down_proj"];

    internal override BypassNetwork NetworkOf(AdapterModule module) => new ScaleNetwork(
        FeedforwardModules.Contains(AdapterSites.ModuleNames[(int)module]) ? BypassAttachment.Input : BypassAttachment.Output);

    internal override void ValidateAt(AdapterModule module, ModelConfig model)
    {
        foreach (string name in FeedforwardModules ?? [])
        {
            Require(
                AdapterSites.Parse(name) is AdapterModule m && AdapterSites.OwnsInput(m) && TargetModules.Contains(name),
                nameof(FeedforwardModules), $"names '{name}'; only o_proj and down_proj may stand there, and in TargetModules too");
        }
    }

    internal override string Describe() => $"(IA)^3, modules {string.Join(", ", TargetModules)}";
}
