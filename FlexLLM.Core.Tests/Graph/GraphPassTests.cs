using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>What differentiation adds to a decoder, and what pruning leaves of it.</summary>
[TestFixture]
internal sealed class GraphPassTests
{
    private static readonly string Forward =
        """
        layers.0.input = Embed(model.embed_tokens.weight)
        layers.0.attn_norm = RmsNorm(layers.0.input, model.layers.0.input_layernorm.weight)
        layers.0.q = Linear(layers.0.attn_norm, model.layers.0.self_attn.q_proj.weight)
        layers.0.k = Linear(layers.0.attn_norm, model.layers.0.self_attn.k_proj.weight)
        layers.0.v = Linear(layers.0.attn_norm, model.layers.0.self_attn.v_proj.weight)
        layers.0.q_rope = Rope(layers.0.q)
        layers.0.k_rope = Rope(layers.0.k)
        layers.0.heads, layers.0.lse = Attention(layers.0.q_rope, layers.0.k_rope, layers.0.v)
        layers.0.o = Linear(layers.0.heads, model.layers.0.self_attn.o_proj.weight)
        layers.0.middle = Add(layers.0.input, layers.0.o)
        layers.0.mlp_norm = RmsNorm(layers.0.middle, model.layers.0.post_attention_layernorm.weight)
        layers.0.gate = Linear(layers.0.mlp_norm, model.layers.0.mlp.gate_proj.weight)
        layers.0.up = Linear(layers.0.mlp_norm, model.layers.0.mlp.up_proj.weight)
        layers.0.act = SiluGate(layers.0.gate, layers.0.up)
        layers.0.down.bypass.1 = Narrow(layers.0.act, model.layers.0.mlp.down_proj.lora_A)
        layers.0.down.bypass.2 = Widen(layers.0.down.bypass.1, model.layers.0.mlp.down_proj.lora_B)
        layers.0.down.base = Linear(layers.0.act, model.layers.0.mlp.down_proj.weight)
        layers.0.down = Add(layers.0.down.base, layers.0.down.bypass.2)
        final.input = Add(layers.0.middle, layers.0.down)
        final.norm = RmsNorm(final.input, model.norm.weight)
        logits = Logits(final.norm, lm_head.weight)
        loss, d final.norm = CrossEntropy(final.norm, lm_head.weight)

        """.ReplaceLineEndings("\n");

    // Of the whole backward pass only the way from the loss to the bypass is left, and of its inputs only the bypass's own.
    private const string BackwardPruned =
        "d final.input = RmsNormBackward(d final.norm, model.norm.weight, final.input)\n" +
        "d model.layers.0.mlp.down_proj.lora_B = OuterProduct(layers.0.down.bypass.1, d final.input)\n" +
        "d layers.0.down.bypass.1 = Narrow(d final.input, model.layers.0.mlp.down_proj.lora_B)\n" +
        "d model.layers.0.mlp.down_proj.lora_A = OuterProduct(d layers.0.down.bypass.1, layers.0.act)\n";

    [Test]
    public void Build_OneLayer_PrintsAsReviewed() =>
        Assert.That(GraphPrinter.Print(Build(ModelArchitecture.Llama, 1, AdapterModule.DownProj)), Is.EqualTo(Forward));

    [Test]
    public void Differentiate_OneLayer_AppendsAllGradients()
    {
        string text = GraphPrinter.Print(Differentiator.Differentiate(Build(ModelArchitecture.Llama, 1, AdapterModule.DownProj)));
        Assert.That(text, Does.StartWith(Forward));
        string backward = text[Forward.Length..];
        string[] ops = [.. backward.Split('\n').Select(OpOf).Where(o => o.Length > 0)];
        Assert.That(ops.GroupBy(o => o).Select(g => $"{g.Key} {g.Count()}"), Is.EquivalentTo(new[]
        {
            "RmsNormBackward 3", "RmsNormBackwardGain 3", "LinearBackwardInput 7", "LinearBackwardWeight 7", "OuterProduct 2",
            "Narrow 1", "Widen 1", "SiluGateBackward 1", "AttentionBackward 1", "RopeBackward 2", "AddGradient 6", "EmbedBackward 1",
        }));
        Assert.That(backward, Does.StartWith(
            "d final.input = RmsNormBackward(d final.norm, model.norm.weight, final.input)\n" +
            "d model.norm.weight = RmsNormBackwardGain(d final.norm, final.input)\n"));
    }

    [Test]
    public void Prune_OneLayerOfDownProj_PrintsAsReviewed()
    {
        ParallelGraph pruned = Train(ModelArchitecture.Llama, 1, AdapterModule.DownProj);
        Assert.That(GraphPrinter.Print(pruned), Is.EqualTo(Forward + BackwardPruned));
    }

    [Test]
    public void Prune_Any_KeepsNoGradientOfAFrozenWeight([Values] ModelArchitecture architecture, [Values] AdapterModule module)
    {
        ParallelGraph pruned = Train(architecture, 3, module);
        Assert.That(pruned.Nodes.Select(n => n.Op),
            Has.None.AnyOf(OpKind.EmbedBackward, OpKind.LinearBackwardWeight, OpKind.RmsNormBackwardGain));
        Assert.That(pruned.Nodes.Count(n => n.Op == OpKind.OuterProduct), Is.EqualTo(6));
        Assert.That(pruned.Nodes.Count(n => n.Op == OpKind.AttentionBackward), Is.EqualTo(IsAttentionInput(module) ? 3 : 2),
            "below the lowest bypass nothing is left");
    }

    [Test]
    public void Prune_BypassesOfUpperLayersAlone_DropsEverythingBelow()
    {
        ModelConfig config = TinyModel.ConfigOf(ModelArchitecture.Qwen3, 4);
        int[] chosen = [AdapterSites.IndexOf(2, AdapterModule.OProj), AdapterSites.IndexOf(3, AdapterModule.QProj)];
        var sites = new SortedSet<int>(chosen);
        ParallelGraph pruned = GraphPruner.Prune(Differentiator.Differentiate(TrainingGraphs.Lora(config, sites)));
        Assert.That(pruned.Nodes.Where(n => n.IsBackward && n.Layer >= 0).Min(n => n.Layer), Is.EqualTo(2));
        Assert.That(GraphPruner.SavedSet(pruned).Where(v => v.Layer >= 0).Min(v => v.Layer), Is.EqualTo(2));
        TrainingProgram program = TrainingGraphs.Compile(config, TrainingGraphs.Lora(config, sites));
        Assert.That(program.LowestLayer, Is.EqualTo(2));
        Assert.That(program.Layers[0], Is.Empty);
        Assert.That(program.Layers[1], Is.Empty);
        Assert.That(program.Layers[2], Is.Not.Empty);
        Assert.That(program.Sites, Is.EqualTo(sites));
    }

    [Test]
    public void Prune_KeepsEveryForwardNode()
    {
        ParallelGraph forward = Build(ModelArchitecture.Qwen2, 2, AdapterModule.VProj);
        ParallelGraph pruned = Train(ModelArchitecture.Qwen2, 2, AdapterModule.VProj);
        Assert.That(GraphPrinter.Print(pruned), Does.StartWith(GraphPrinter.Print(forward)));
    }

    [Test]
    public void SavedSet_OfDownProj_IsWhatTheWayToItReads()
    {
        // Layer 0: only what its own bypass needs. Layer 1: the whole layer, but the inputs of frozen linears.
        Assert.That(Saved(ModelArchitecture.Llama, AdapterModule.DownProj), Is.EqualTo(new[]
        {
            "layers.0.act",
            "layers.1.input", "layers.1.v", "layers.1.q_rope", "layers.1.k_rope", "layers.1.lse", "layers.1.middle",
            "layers.1.gate", "layers.1.up", "layers.1.act", "final.input",
        }));
    }

    [Test]
    public void SavedSet_OfAllModules_AddsTheInputsOfTheirLinears()
    {
        string[] layer = ["attn_norm", "v", "q_rope", "k_rope", "heads", "lse", "middle", "mlp_norm", "gate", "up", "act"];
        string[] expected = [.. layer.Select(n => $"layers.0.{n}"), "layers.1.input", .. layer.Select(n => $"layers.1.{n}"),
            "final.input"];
        Assert.That(Saved(ModelArchitecture.Llama, Enum.GetValues<AdapterModule>()), Is.EqualTo(expected));
    }

    [Test]
    public void SavedSet_OfQwen3_AddsWhatTheHeadNormsRead()
    {
        string[] without = Saved(ModelArchitecture.Llama, Enum.GetValues<AdapterModule>());
        string[] with = Saved(ModelArchitecture.Qwen3, Enum.GetValues<AdapterModule>());
        Assert.That(with.Except(without), Is.EqualTo(new[] { "layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k" }));
        Assert.That(without.Except(with), Is.Empty);
    }

    [Test]
    public void CompileTraining_Saves_NeitherKeysAndValuesNorWhatItComputesAgain()
    {
        ModelConfig config = TinyModel.ConfigOf(ModelArchitecture.Llama);
        TrainingProgram program = TrainingGraphs.Compile(config, Build(ModelArchitecture.Llama, 2, AdapterModule.DownProj));
        Assert.That(program.Saved.Select(s => s.Name), Is.EqualTo(new[]
        {
            "layers.0.act", "layers.1.input", "layers.1.q_rope", "layers.1.lse", "layers.1.middle", "layers.1.gate",
            "layers.1.up",
        }));
        Assert.That(program.SavedColumns, Is.EqualTo(100 + 48 + 48 + 4 + 48 + 100 + 100));
        Assert.That(program.Saved.Where(s => s.ByAttention).Select(s => s.Name), Is.EqualTo(new[] { "layers.1.lse" }));
    }

    private static bool IsAttentionInput(AdapterModule module) =>
        module is AdapterModule.QProj or AdapterModule.KProj or AdapterModule.VProj;

    private static string OpOf(string line) => line.Contains(" = ", StringComparison.Ordinal)
        ? line.Split(" = ")[1].Split('(')[0] : string.Empty;

    private static string[] Saved(ModelArchitecture architecture, params AdapterModule[] modules) =>
        [.. GraphPruner.SavedSet(Train(architecture, 2, modules)).Select(v => v.Name)
            .Where(n => !n.Contains("bypass", StringComparison.Ordinal))];

    private static ParallelGraph Train(ModelArchitecture architecture, int layers, params AdapterModule[] modules) =>
        GraphPruner.Prune(Differentiator.Differentiate(Build(architecture, layers, modules)));

    private static ParallelGraph Build(ModelArchitecture architecture, int layers, params AdapterModule[] modules) =>
        TrainingGraphs.Lora(TinyModel.ConfigOf(architecture, layers), modules);
}
