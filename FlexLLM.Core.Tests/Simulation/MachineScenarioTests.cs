using System.Globalization;
using System.Text.Json;
using System.Text.RegularExpressions;
using FlexLLM.Benchmarks;
using FlexLLM.Benchmarks.Serving;
using FlexLLM.Formats;
using FlexLLM.Scheduling;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>`simulate --scenario machine`: what `serve` does, on a profile.</summary>
[TestFixture]
[Parallelizable]
internal sealed class MachineScenarioTests
{
    // The pass over the weights 8 ms, a row 2 ms, of finetuning 2.6 forward and 1.5 backward; 0 % to 1 % longer by chance.
    private static readonly LatencyModel Profile = new(
        LatencyCoefficients.Linear(
            step: 8e-3, row: 2e-3, context: 3.6e-6, forwardWindow: 3.6e-3, forwardRow: 2.6e-3, forwardContext: 1.1e-6,
            backwardItem: 5e-4, backwardRow: 3.7e-4, backwardContext: 1.1e-7),
        Correction: 1.0, Tail: 1.1);

    private string _folder = null!;

    [SetUp]
    public void MakeFolder()
    {
        _folder = Directory.CreateTempSubdirectory("machine-").FullName;
        AtomicFile.WriteJson(ProfileFile, json =>
        {
            json.WriteStartObject();
            FlexLLM.Engine.LatencyProfileFile.WriteModel(json, Profile);
            json.WriteEndObject();
        });
    }

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    private string ProfileFile => Path.Combine(_folder, "profile.json");

    private string ReportFile => Path.Combine(_folder, "report.json");

    private string[] Small => ["--scenario", "machine", "--profile", ProfileFile, "--shape", "tiny", "--max-answer", "32"];

    /// <summary>Loads and targets follow from what the profile says of an engine alone.</summary>
    [Test]
    public void Run_LinearProfile_CapacityIsTheProfiles()
    {
        string text = Run([.. Small, "--modes", "inference-only", "--loads", "light", "--seconds", "20", "--jitter", "0.001"]);

        // A step of one row takes 10 ms, and a little for what it attends; 16 rows 40 ms and so, of which a part is prompts.
        Assert.That(Number(text, @"alone: TPOT ([\d.]+) ms"), Is.EqualTo(10.3).Within(0.4));
        Assert.That(Number(text, @"targets: TPOT ([\d.]+) ms"), Is.EqualTo(31).Within(1.1), "three times that");
        double generated = Number(text, @"capacity: ([\d.]+) generated");
        Assert.That(generated, Is.InRange(0.2 * 16 / 0.040, 16 / 0.040));
        double requests = Number(text, @"generated tokens/s, ([\d.]+) requests/s");
        Assert.That(Number(text, @"light ([\d.]+) requests/s"), Is.EqualTo(0.1 * requests).Within(0.01));
    }

    [Test]
    public void Run_ModesBesideTheOracle_AreOrderedAsTheyMustBe()
    {
        string[] args =
        [
            .. Small, "--modes", "co-serving,oracle,inference-only,finetune-only,split",
            "--loads", "light", "--seconds", "60", "--rounds", "2",
        ];

        string text = Run([.. args, "--json", ReportFile]);

        (double Trained, double? Attained) co = Of("co-serving");
        double alone = Of("finetune-only").Trained;
        TestContext.Out.WriteLine(text);
        Assert.That(co.Attained, Is.EqualTo(1.0));
        Assert.That(co.Trained, Is.InRange(0.8 * Of("oracle").Trained, 1.02 * Of("oracle").Trained));
        Assert.That(Of("oracle").Trained, Is.LessThan(alone), "requests take time");
        Assert.That(Of("inference-only").Trained, Is.Zero);
        Assert.That(Of("split").Trained, Is.EqualTo(alone / 2).Within(0.02 * alone), "of half of the machine");
        Assert.That(text, Does.Match(@"light, finetuning as a share of the oracle's: co-serving [\d.]+ %, split [\d.]+ %"));
        Assert.That(Digests(), Is.EqualTo(Digests(() => Run([.. args, "--json", ReportFile]))), "another time the same");
    }

    [Test]
    public void Run_SamplesOfAFile_AreAsLongAsTheirText()
    {
        using var model = new TinyModel(ModelArchitecture.Llama, withTokenizer: true);
        string data = Path.Combine(_folder, "data.jsonl");
        File.WriteAllText(data, "{\"question\": \"What is it?\", \"answer\": \"It is a test.\"}\n");
        int length = Tokenizer.Load(model.Folder).Encode("What is it?\nIt is a test.").Length;

        Run(
        [
            "--scenario", "machine", "--profile", ProfileFile, "--model", model.Folder, "--data", data, "--modes", "finetune-only",
            "--sample-tokens", "48", "--max-prompt", "8", "--max-answer", "8", "--seconds", "20", "--json", ReportFile,
        ]);

        using JsonDocument report = JsonDocument.Parse(File.ReadAllText(ReportFile));
        Assert.That(report.RootElement.GetProperty("runs")[0].GetProperty("tokens_trained").GetInt64() % length, Is.Zero);
    }

    /// <summary>The name of a load that is a rate has a slash.</summary>
    [Test]
    public void Run_RateWithLog_KeepsAFileAnEngine()
    {
        string logs = Path.Combine(_folder, "logs");

        Run([.. Small, "--modes", "co-serving,split", "--rates", "0.5", "--seconds", "10", "--log", logs]);

        Assert.That(
            Directory.GetFiles(logs).Select(Path.GetFileName).Order(StringComparer.Ordinal),
            Is.EqualTo(new[] { "co-serving-0.5 req.s-1-1.log", "split-0.5 req.s-1-1.log", "split-0.5 req.s-1-2.log" }));
    }

    [Test]
    public void Run_TraceShorterThanTheWindow_IsRefused()
    {
        string trace = Path.Combine(_folder, "trace.csv");
        File.WriteAllText(trace, "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:45,3,4\n2023-11-16 18:15:50,3,4\n");

        Assert.That(
            () => Run([.. Small, "--trace", trace, "--modes", "co-serving", "--rates", "0.5", "--seconds", "20"]),
            Throws.ArgumentException.With.Message.StartsWith("The trace is 5 s long"));
    }

    [TestCase("--profile", "none.json", "none.json")]
    [TestCase("--modes", "co-serving,none", "'none' is no mode")]
    [TestCase("--device", "cuda:0", "'--device' is no option")]
    [TestCase("--sample-tokens", "4096", "the model takes at most 2048")]
    public void Run_BadArgument_IsNamed(string name, string value, string fault)
    {
        string[] args = [.. Small.TakeWhile(a => a != name), .. Small.SkipWhile(a => a != name).Skip(2), name, value];
        Assert.That(
            () => Run(args), Throws.InstanceOf<ArgumentException>().Or.InstanceOf<FlexLlmException>().With.Message.Contains(fault));
    }

    [Test]
    public void Run_WithoutAProfile_SaysSo() => Assert.That(
        () => Run(["--scenario", "machine", "--shape", "tiny"]), Throws.ArgumentException.With.Message.EqualTo("--profile is missing."));

    /// <summary>The oracle is not for engines that run in real time.</summary>
    [Test]
    public void Parse_OracleInRealTime_IsNoMode() => Assert.That(
        () => ServeSettings.Parse(["--shape", "tiny", "--modes", "oracle"]),
        Throws.ArgumentException.With.Message.Contains("'oracle' is no mode"));

    private static string Run(string[] args)
    {
        var output = new StringWriter();
        Assert.That(SimulateVerb.Run(args, output, TextWriter.Null), Is.Zero);
        return output.ToString();
    }

    private static double Number(string text, string pattern) =>
        double.Parse(Regex.Match(text, pattern).Groups[1].Value, CultureInfo.InvariantCulture);

    private (double Trained, double? Attained) Of(string mode)
    {
        using JsonDocument report = JsonDocument.Parse(File.ReadAllText(ReportFile));
        JsonElement run = report.RootElement.GetProperty("runs").EnumerateArray().Single(r => r.GetProperty("mode").GetString() == mode);
        JsonElement attained = run.GetProperty("attainment");
        return (
            run.GetProperty("trained_per_second").GetDouble(), attained.ValueKind == JsonValueKind.Null ? null : attained.GetDouble());
    }

    private string[] Digests(Action? before = null)
    {
        before?.Invoke();
        using JsonDocument report = JsonDocument.Parse(File.ReadAllText(ReportFile));
        return [.. report.RootElement.GetProperty("runs").EnumerateArray().Select(r => r.GetProperty("event_hash").GetString()!)];
    }
}
