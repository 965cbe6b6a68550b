using System.Security.Cryptography;
using System.Text.Json;
using FlexLLM.Benchmarks;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>The `simulate` verb: tables, reports, the event log, and bad arguments.</summary>
[TestFixture]
[Parallelizable]
internal sealed class SimulateVerbTests
{
    private static readonly string[] Small = ["--model", "8b", "--minutes", "1", "--rates", "8"];

    private string _folder = null!;

    [SetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("simulate-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void Run_SomeModes_PrintsAndSavesThem()
    {
        string json = Path.Combine(_folder, "report.json");
        string html = Path.Combine(_folder, "report.html");

        string table = Run([.. Small, "--modes", "co-serving,inference-only,finetune-only", "--json", json, "--html", html]);

        Assert.That(table, Does.Match(@"SLO attainment, %\s+8\s+co-serving\s+100\.0(.|\n)*finetune-only\s+-"));
        Assert.That(File.ReadAllText(html), Does.StartWith("<!DOCTYPE html>").And.Contains("finetune-only"));
        using JsonDocument report = JsonDocument.Parse(File.ReadAllText(json));
        JsonElement[] runs = [.. report.RootElement.GetProperty("runs").EnumerateArray()];
        double[] trained = [.. runs.Select(r => r.GetProperty("trained_per_second").GetDouble())];
        double[] generated = [.. runs.Select(r => r.GetProperty("generated_per_second").GetDouble())];
        Assert.That(trained[1], Is.Zero, "inference-only");
        Assert.That(generated[2], Is.Zero, "finetune-only");
        Assert.That(trained[0], Is.GreaterThan(0).And.LessThan(trained[2]), "co-serving has a part of the machine");
        Assert.That(runs[..2].Select(r => r.GetProperty("requests").GetInt32()), Is.All.EqualTo(120), "and answers all");
        Assert.That(runs[..2].Select(r => r.GetProperty("requests_unfinished").GetInt32()), Is.All.Zero);
    }

    /// <summary>The digest that is reported is that of the lines that can be read.</summary>
    [Test]
    public void Run_WithLog_KeepsTheEventsThatItsDigestIsOf()
    {
        string progress = Progress([.. Small, "--modes", "co-serving,split-1/4", "--log", _folder]);
        string again = Progress([.. Small, "--modes", "co-serving,split-1/4"]);

        Assert.That(Hashes(progress), Is.EqualTo(Hashes(again)), "with a log or without");
        string[] files = [.. Directory.GetFiles(_folder).Select(f => Path.GetFileName(f)!).Order(StringComparer.Ordinal)];
        Assert.That(
            files, Is.EqualTo(new[] { "8b-co-serving-8-1-1.log", "8b-split-1.4-8-1-1.log", "8b-split-1.4-8-1-2.log" }),
            "a file an engine");
        foreach (string file in files)
        {
            string digest = Convert.ToHexString(SHA256.HashData(File.ReadAllBytes(Path.Combine(_folder, file))))[..16];
            Assert.That(progress, Does.Contain(digest), file);
        }

        string[] lines = [.. File.ReadLines(Path.Combine(_folder, files[0])).Where(l => !l.StartsWith('#'))];
        Assert.That(lines.Select(l => l.Split(' ')[0]).Distinct(), Is.EquivalentTo(new[] { "step", "given-up", "admit", "token" }));
        long[][] steps = [.. lines.Where(l => l.StartsWith("step", StringComparison.Ordinal))
            .Select(l => l.Split(' ').Skip(1).Select(long.Parse).ToArray())];
        Assert.That(steps.Zip(steps.Skip(1)).All(s => s.Second[0] >= s.First[0] + s.First[1] - 1), Is.True, "one after another");
        Assert.That(steps.Any(s => s[4] > 0) && steps.Any(s => s[5] > 0), Is.True, "forward and backward rows");
    }

    [TestCase("--modes", "co-serving,none", "--modes: 'none' is no mode")]
    [TestCase("--rates", "4,0", "--rates")]
    [TestCase("--seeds", "0", "--seeds")]
    [TestCase("--minutes", "-1", "--minutes")]
    [TestCase("--model", "9b", "9b")]
    [TestCase("--scenario", "mine", "--scenario: 'mine' is unknown")]
    [TestCase("--lengths", "trace", "needs --trace")]
    [TestCase("--lengths", "long", "--lengths: 'long'")]
    [TestCase("--speed", "9", "--speed")]
    public void Run_BadArgument_IsNamed(string name, string value, string fault) =>
        Assert.That(() => Run([name, value]), Throws.InstanceOf<ArgumentException>().With.Message.Contains(fault));

    [Test]
    public void Run_BrokenTraceOrProfile_NamesFileAndLine()
    {
        string trace = Path.Combine(_folder, "trace.csv");
        File.WriteAllText(trace, "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,4\n2023-11-16 18:15:45,3,4\n");

        Assert.That(
            () => Run([.. Small, "--trace", trace]),
            Throws.TypeOf<InvalidFileException>().With.Message.Contains("trace.csv").And.Message.Contains("line 3"));
        Assert.That(
            () => Run([.. Small, "--profile", Path.Combine(_folder, "none.json")]),
            Throws.TypeOf<InvalidFileException>().With.Message.Contains("none.json"));
    }

    [Test]
    public void Run_LengthsOfTheTrace_AreTheTraces()
    {
        string trace = Path.Combine(_folder, "trace.csv");
        IEnumerable<string> rows = Enumerable.Range(0, 3_600).Select(i => $"2023-11-16 18:{i / 60:00}:{i % 60:00},7,3");
        File.WriteAllLines(trace, ["TIMESTAMP,ContextTokens,GeneratedTokens", .. rows]);
        string json = Path.Combine(_folder, "report.json");

        Run([.. Small, "--modes", "inference-only", "--trace", trace, "--lengths", "trace", "--json", json]);

        using JsonDocument report = JsonDocument.Parse(File.ReadAllText(json));
        JsonElement run = report.RootElement.GetProperty("runs")[0];
        Assert.That(
            run.GetProperty("tokens_generated").GetInt32(), Is.EqualTo(4 * 3 * run.GetProperty("requests").GetInt32()).Within(48),
            "of all four pipelines, but for those that were answered after the minute");
    }

    private static string Run(string[] args)
    {
        var output = new StringWriter();
        Assert.That(SimulateVerb.Run(args, output, TextWriter.Null), Is.Zero);
        return output.ToString();
    }

    private static string Progress(string[] args)
    {
        var progress = new StringWriter();
        Assert.That(SimulateVerb.Run(args, TextWriter.Null, progress), Is.Zero);
        return progress.ToString();
    }

    // Runs end in any order.
    private static IEnumerable<string> Hashes(string progress) => progress.Split('\n', StringSplitOptions.RemoveEmptyEntries)
        .Select(line => line.Split("log ")[1].Trim()).Order(StringComparer.Ordinal);
}
