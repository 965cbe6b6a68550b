using FlexLLM.Graph;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>What a report says of a pass: roles with their layers.</summary>
[TestFixture]
internal sealed class PassReportTests
{
    private static readonly ModelConfig Model = TinyModel.ConfigOf(ModelArchitecture.Llama, 3);

    [Test]
    public void Of_LoraOnDownProj_SaysWhatEachPassKeepsFreesAndRepeats()
    {
        IReadOnlyList<PassReport> reports = Reports(new LoraConfig { Rank = 2, TargetModules = ["down_proj"] });
        Assert.That(reports.Select(r => r.Pass), Is.EqualTo(new[]
        {
            "build", "differentiate", "prune", "rematerialize", "compress", "fuse",
        }));

        PassReport prune = reports[2];
        Assert.That(Text(prune.Kept), Is.EqualTo(
            "act 3, gate 2, up 2, input 2, middle 2, q_rope 2, k_rope 2, v 2, lse 2, down.bypass.1 3"));
        Assert.That(Text(prune.Freed), Is.EqualTo(
            "attn_norm 3, heads 3, mlp_norm 3, gate 1, up 1, input 1, middle 1, q_rope 1, k_rope 1, v 1, lse 1"));

        PassReport rematerialize = reports[3];
        Assert.That(Text(rematerialize.Freed), Is.EqualTo("act 2, down.bypass.1 3"));
        Assert.That(Text(rematerialize.Recomputed), Is.EqualTo("act 2, down.bypass.1 3"));
        Assert.That(rematerialize.RecomputedFlops, Is.EqualTo((2 * 8.0 * 100) + (3 * 2.0 * 2 * 100)));
        Assert.That(Text(reports[4].Freed), Is.Empty, "nothing to compress");
        Assert.That(Text(reports[5].Kept), Is.EqualTo(Text(rematerialize.Kept)));
    }

    [Test]
    public void Of_PackedValues_SaysThatTheyTakeThePlaceOfOthers()
    {
        var lora = new LoraConfig { Rank = 2, TargetModules = ["down_proj"] };
        PassReport compress = Reports(lora, new CompilerOptions { StoresSavedAsBF16 = true }).Single(r => r.Pass == "compress");
        Assert.That(Text(compress.Freed), Is.EqualTo("gate 2, up 2, act 1, input 2, middle 2, q_rope 2"));
        RoleSum packed = compress.Kept.Single(r => r.Role == "gate packed");
        Assert.That(packed, Is.EqualTo(new RoleSum("gate packed", 2, 50, true)));
        Assert.That(packed.BytesPerLayer(2), Is.EqualTo(200), "containers have 32 bits however wide elements are");
    }

    [Test]
    public void KeptBytes_CountTheLogSumExpInFullWidth()
    {
        PassReport prune = Reports(new LoraConfig { Rank = 2, TargetModules = ["down_proj"] }).Single(r => r.Pass == "prune");
        RoleSum lse = prune.Kept.Single(r => r.Role == "lse");
        Assert.That((lse.BytesPerLayer(2), lse.BytesPerLayer(4)), Is.EqualTo((16L, 16L)));
        Assert.That(prune.KeptBytes(2), Is.EqualTo((2 * prune.KeptColumns) + (2 * lse.ColumnsTotal)));
        Assert.That(prune.KeptBytes(4), Is.EqualTo(4 * prune.KeptColumns));
    }

    private static IReadOnlyList<PassReport> Reports(PeftConfig method, CompilerOptions? options = null) =>
        PassReport.Of(GraphCompiler.Passes(TrainingGraphs.Of(Model, method), options ?? new CompilerOptions()), 64);

    private static string Text(IEnumerable<RoleSum> roles) => string.Join(", ", roles.Select(r => $"{r.Role} {r.Layers}"));
}
