using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>
/// Which saved values the rematerializer replaces by recipes. That the bits stay is checked where gradients are.
/// </summary>
[TestFixture]
internal sealed class RematerializerTests
{
    [Test]
    public void Rematerialize_DownProj_RecomputesTheGatedProduct() =>
        Assert.That(SavedOfLayer1(ModelArchitecture.Llama, AdapterModule.DownProj), Is.EqualTo(
            "layers.1.input, layers.1.q_rope, layers.1.lse, layers.1.middle, layers.1.gate, layers.1.up"));

    [Test]
    public void Rematerialize_AllModules_RecomputesNormsToo() =>
        Assert.That(SavedOfLayer1(ModelArchitecture.Llama, Enum.GetValues<AdapterModule>()), Is.EqualTo(
            "layers.1.input, layers.1.q_rope, layers.1.heads, layers.1.lse, layers.1.middle, layers.1.gate, layers.1.up"));

    [Test]
    public void Rematerialize_HeadNorms_RecomputesTheRotatedQueries() =>
        Assert.That(SavedOfLayer1(ModelArchitecture.Qwen3, AdapterModule.QProj), Is.EqualTo(
            "layers.1.input, layers.1.q, layers.1.k, layers.1.lse, layers.1.middle, layers.1.gate, layers.1.up"));

    [Test]
    public void Rematerialize_LowestLayer_KeepsOnlyWhatItsBypassReads() =>
        Assert.That(Saved(ModelArchitecture.Llama, 0, AdapterModule.DownProj), Is.EqualTo("layers.0.act"));

    [Test]
    public void Rematerialize_AnyGraph_LeavesNoReaderWithoutAProducer()
    {
        foreach (AdapterModule module in Enum.GetValues<AdapterModule>())
        {
            foreach (ModelArchitecture architecture in Enum.GetValues<ModelArchitecture>())
            {
                ParallelGraph graph = Pruned(architecture, [module]);
                Assert.That(() => GraphVerifier.Verify(Rematerializer.Rematerialize(graph)), Throws.Nothing, $"{architecture} {module}");
            }
        }
    }

    [Test]
    public void Rematerialize_SavedSet_NeverGrows()
    {
        foreach (AdapterModule module in Enum.GetValues<AdapterModule>())
        {
            ParallelGraph before = Pruned(ModelArchitecture.Qwen3, [module]);
            long columnsBefore = GraphPruner.SavedSet(before).Sum(v => (long)v.Columns);
            long columnsAfter = GraphPruner.SavedSet(Rematerializer.Rematerialize(before)).Sum(v => (long)v.Columns);
            Assert.That(columnsAfter, Is.LessThanOrEqualTo(columnsBefore), module.ToString());
        }
    }

    private static string SavedOfLayer1(ModelArchitecture architecture, params AdapterModule[] modules) => Saved(architecture, 1, modules);

    private static string Saved(ModelArchitecture architecture, int layer, params AdapterModule[] modules)
    {
        ModelConfig config = Config(architecture);
        TrainingProgram program = TrainingGraphs.Compile(config, TrainingGraphs.Lora(config, modules));
        return string.Join(", ", program.Saved.Select(s => s.Name).Where(n => n.StartsWith($"layers.{layer}.", StringComparison.Ordinal)));
    }

    private static ParallelGraph Pruned(ModelArchitecture architecture, AdapterModule[] modules)
    {
        ModelConfig config = Config(architecture);
        return GraphPruner.Prune(Differentiator.Differentiate(TrainingGraphs.Lora(config, modules)));
    }

    private static ModelConfig Config(ModelArchitecture architecture) => new()
    {
        Architecture = architecture,
        HiddenSize = 32,
        IntermediateSize = 80,
        LayerCount = 3,
        AttentionHeads = 4,
        KeyValueHeads = 2,
        HeadDim = 8,
        VocabularySize = 64,
        MaxPositions = 64,
    };
}
