using System.Text.Json;
using FlexLLM.Benchmarks;
using FlexLLM.Formats;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Goldens;

/// <summary>The paper's memory tables, recomputed by the code of the verb `plan`.</summary>
[TestFixture]
internal sealed class PlanAblationTests
{
    private PlanAblation _ablation = null!;

    [OneTimeSetUp]
    public void SetUp() => _ablation = PlanAblation.Compute();

    [Test]
    public void Ablation_SavesWhatThePaperSaves()
    {
        Assert.That(_ablation.Cases.Select(c => c.Shape).Distinct(), Is.EqualTo(new[] { "llama-70b-4h", "llama-3.1-70b" }));
        Dictionary<string, double> most = new() { ["LoRA"] = 0.85, ["Adapter"] = 0.85, ["(IA)^3"] = 0.87 };
        foreach (AblationCase c in _ablation.Cases)
        {
            string name = $"{c.Shape} {c.Paper.Name}";
            Assert.That(c.Saved(c.Plan.Pruned), Is.GreaterThanOrEqualTo(0.71), name);
            Assert.That(c.Saved(c.Plan.Pruned), Is.GreaterThanOrEqualTo(c.PaperSaved(1)), name);
            Assert.That(c.Saved(c.Budgeted), Is.GreaterThanOrEqualTo(most[c.Paper.Name]), name);
            Assert.That(c.Saved(c.Budgeted), Is.GreaterThanOrEqualTo(c.PaperSaved(3)), name);
            Assert.That(c.Budgeted.Bytes, Is.LessThanOrEqualTo(c.PaperBytes(3)), name);
            Assert.That(c.Plan.Stages.Append(c.Budgeted).Select(s => s.Bytes), Is.Ordered.Descending, name);
        }
    }

    [Test]
    public void Ablation_UnoptimizedGraph_IsThePapersWithinATwentieth()
    {
        foreach (AblationCase c in _ablation.Cases.Where(c => c.Shape == "llama-70b-4h"))
        {
            Assert.That((double)c.Plan.Unoptimized.Bytes / c.PaperBytes(0), Is.EqualTo(1).Within(0.05), c.Paper.Name);
        }
    }

    [Test]
    public void Ablation_WithoutBudget_RepeatsNoLinear()
    {
        foreach (AblationCase c in _ablation.Cases)
        {
            Assert.That(c.Again(c.Plan.TokenLevel), Is.LessThan(0.001), c.Paper.Name);
            Assert.That(c.Plan.TokenLevel.Forced, Is.Empty);
            Assert.That(c.Again(c.Budgeted), Is.LessThan(0.1), "what the paper saves costs less than a tenth of a step");
        }
    }

    [Test]
    public void LongSamples_TakeAtMostThreeFifthsOfTheReleasedCode()
    {
        Assert.That(_ablation.Samples.Select(s => s.Job.Ranks), Is.EqualTo(new[] { 1, 2, 4 }));
        foreach (LongSample sample in _ablation.Samples)
        {
            Assert.That(sample.Bytes, Is.LessThanOrEqualTo(0.6 * sample.ReleasedBytes), sample.Shape);
            Assert.That(sample.BudgetFlopsShare, Is.LessThan(0.07), sample.Shape);
            Assert.That(sample.ReleasedBytesByOperator / 1e9, Is.EqualTo(sample.ReleasedBytes / 1e9).Within(0.05), sample.Shape);
        }

        Assert.That(_ablation.Samples[0].Final.Forced, Is.Empty, "8B needs no budget");
    }

    [Test]
    public void Print_IsTheGoldenText()
    {
        var text = new StringWriter { NewLine = "\n" };
        _ablation.Print(text);
        GoldenText.Check(text.ToString(), "Goldens", "plan-ablation.golden.txt");
    }

    [Test]
    public void Write_IsJsonWithEveryStage()
    {
        using var stream = new MemoryStream();
        AtomicFile.WriteJson(stream, _ablation.Write);
        using JsonDocument document = JsonDocument.Parse(stream.ToArray());
        JsonElement[] cases = [.. document.RootElement.GetProperty("ablation").EnumerateArray()];
        Assert.That(cases, Has.Length.EqualTo(6));
        foreach ((JsonElement json, AblationCase c) in cases.Zip(_ablation.Cases))
        {
            Assert.That(
                json.GetProperty("stages").EnumerateArray().Select(s => s.GetProperty("bytes").GetInt64()),
                Is.EqualTo(c.Plan.Stages.Append(c.Budgeted).Select(s => s.Bytes)));
        }

        JsonElement sample = document.RootElement.GetProperty("long_samples")[2];
        Assert.That(sample.GetProperty("rows").EnumerateArray().Sum(r => r.GetProperty("bytes").GetInt64()),
            Is.EqualTo(sample.GetProperty("bytes").GetInt64()));
    }
}
