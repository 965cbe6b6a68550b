using FlexLLM.Models;

namespace FlexLLM;

/// <summary>Shape of a LoRA adapter: y += scale * (x A^T) B^T at every target module of every layer.</summary>
public sealed record LoraConfig
{
    /// <summary>Greatest rank that the engine takes.</summary>
    public const int RankMax = 256;

    /// <summary>All seven linear modules of a layer, for <see cref="TargetModules"/>.</summary>
    public static IReadOnlyList<string> AllModules => AdapterSites.ModuleNames;

    /// <summary>Rank r of the bypass, 1 to <see cref="RankMax"/>.</summary>
    /// <value>8.</value>
    public int Rank { get; init; } = 8;

    /// <summary>PEFT's lora_alpha. The scale is alpha / r, or alpha / sqrt(r) with <see cref="UseRsLora"/>.</summary>
    /// <value>16.</value>
    public float Alpha { get; init; } = 16;

    /// <summary>Rank-stabilised scale, alpha / sqrt(r).</summary>
    public bool UseRsLora { get; init; }

    /// <summary>Any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.</summary>
    /// <value>q_proj and v_proj, as PEFT does for LLaMA and Qwen.</value>
    public IReadOnlyList<string> TargetModules { get; init; } = ["q_proj", "v_proj"];

    /// <summary>The factor applied to the bypass.</summary>
    public float Scale => UseRsLora ? Alpha / MathF.Sqrt(Rank) : Alpha / Rank;
}
