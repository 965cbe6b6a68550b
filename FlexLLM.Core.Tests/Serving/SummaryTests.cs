using FlexLLM.Benchmarks;
using FlexLLM.Tests.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Serving;

/// <summary>The table of what the other verbs wrote.</summary>
[TestFixture]
internal sealed class SummaryTests
{
    private const string Infer =
        """{"results": [{"work": "decode 8", "tokens_per_second": {"median": 12.5}, "share_of_bound": 0.715, "bound": "copy"}]}""";

    private const string Serve =
        """
        {"runs": [
          {"mode": "finetune-only", "load": "none", "trained_per_second": 50, "share_of_matrix_rate": 0.5, "attainment": null},
          {"mode": "co-serving", "load": "5 req/s", "trained_per_second": 40, "share_of_matrix_rate": 0.6, "attainment": 0.975,
           "generated_per_second": 7, "share_of_copy_bandwidth": 0.2, "ttft_seconds": {"mean": 0.25, "p99": 1}, "tpot_seconds": null}
        ]}
        """;

    private const string RooflineJson =
        """
        {"results": [{"name": "copy", "per_second": {"max": 2e9}, "unit": "bytes"}],
         "calls": [{"shape": "llama-3.1-8b", "rows": 1, "adapters": 2, "called_seconds": {"median": 0.002},
                    "shares": [{"of": "X", "share": 0.25}, {"of": "Y", "share": 0.5}]}]}
        """;

    private TempFolder _folder = null!;

    [SetUp]
    public void SetUp() => _folder = new TempFolder();

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [Test]
    public void Write_FilesThatAreThere_AreInTheTable()
    {
        Assert.That(() => SummaryVerb.Write(_folder.Path, TextWriter.Null), Throws.ArgumentException);
        Save("infer", Infer);
        Save("serve", Serve);
        Save("roofline", RooflineJson);
        string[] lines = Table();
        Assert.That(lines, Has.Some.Matches(@"^infer +decode 8 +12\.5 tokens/s +71\.5 copy$"));
        Assert.That(lines, Has.Some.Matches(@"^serve +co-serving, 5 req/s: kept of finetune-only +80\.0 % *$"));
        Assert.That(lines, Has.Some.Matches(@"^serve +co-serving, 5 req/s: TTFT mean +250\.0 ms *$"));
        Assert.That(lines, Has.Some.Matches(@"^roofline +copy +2\.0 GB/s *$"));
        Assert.That(lines, Has.Some.Matches(
            @"^roofline +calls of a decode step, llama-3\.1-8b, batch 1, adapters 2 +2\.0 ms +25\.0 reading the weights at X$"));
        Assert.That(lines, Has.None.Contains("TPOT").And.None.Contains("finetune-only, none: attained"), "Control: what is not there.");
    }

    [TestCase("{")]
    [TestCase("{}")]
    [TestCase("""{"results": 1}""")]
    [TestCase("""{"results": [{"work": 1}]}""")]
    public void Write_BrokenFile_IsNamed(string text)
    {
        Save("infer", text);
        Assert.That(() => Table(), Throws.TypeOf<InvalidFileException>().With.Message.Contains("infer.json"));
    }

    private void Save(string name, string text) => File.WriteAllText(Path.Combine(_folder.Path, name + ".json"), text);

    private string[] Table()
    {
        using var output = new StringWriter();
        SummaryVerb.Write(_folder.Path, output);
        return [.. output.ToString().Split('\n').Select(line => line.TrimEnd())];
    }
}
