using System.Text.Json;
using System.Text.RegularExpressions;
using FlexLLM.Benchmarks;
using FlexLLM.Models;
using FlexLLM.Tests.Formats;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Goldens;

/// <summary>The verb `plan` from its arguments to its text and files.</summary>
[TestFixture]
internal sealed partial class PlanVerbTests
{
    private TempFolder _folder = null!;

    [SetUp]
    public void SetUp() => _folder = new TempFolder();

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [TestCase("plan-lora.golden.txt", "--shape tiny --modules all --rank 4 --tokens 512 --window 64 --ranks 2 --budget 1.3MB")]
    [TestCase("plan-adapter.golden.txt", "--shape tiny --method adapter --rank 8 --tokens 256 --bytes 4 --save-bf16")]
    [TestCase("plan-ia3.golden.txt", "--shape qwen2.5-0.5b --method ia3 --ranks 2 --machine h100")]
    public void Run_IsTheGoldenText(string golden, string arguments)
    {
        string text = Plan(arguments.Split(' '));
        Assert.That(CompileTime().Count(text), Is.EqualTo(1));
        GoldenText.Check(CompileTime().Replace(text, "in N ms"), "Goldens", golden);
    }

    [Test]
    public void Run_ConfigFile_NeedsNoWeights()
    {
        ModelShapes.Of("tiny").Save(_folder.Path);
        string text = CompileTime().Replace(Plan("--config", _folder.Path, "--tokens", "64"), "");
        Assert.That(text, Is.EqualTo(CompileTime().Replace(Plan("--shape", "tiny", "--tokens", "64"), "")));
        Assert.That(CompileTime().Replace(Plan("--config", _folder["config.json"], "--tokens", "64"), ""), Is.EqualTo(text));
    }

    [Test]
    public void Run_Files_HoldTheReportAndThePicture()
    {
        Plan("--shape", "tiny", "--ranks", "2", "--json", _folder["plan.json"], "--dot", _folder["layer.dot"], "--layer", "1");
        Assert.That(File.ReadAllText(_folder["layer.dot"]), Does.StartWith("digraph layer_1 {\n").And.Contains("gate\\n80 kept"));
        using JsonDocument document = JsonDocument.Parse(File.ReadAllText(_folder["plan.json"]));
        JsonElement root = document.RootElement;
        Assert.That(
            root.GetProperty("passes").EnumerateArray().Select(p => p.GetProperty("pass").GetString()),
            Is.EqualTo(new[] { "build", "differentiate", "prune", "rematerialize", "compress", "fuse" }));
        JsonElement[] stages = [.. root.GetProperty("stages").EnumerateArray()];
        foreach (JsonElement stage in stages)
        {
            Assert.That(
                stage.GetProperty("rows").EnumerateArray().Sum(r => r.GetProperty("bytes").GetInt64()),
                Is.EqualTo(stage.GetProperty("bytes").GetInt64()));
        }

        Assert.That(
            root.GetProperty("total_bytes").GetInt64(),
            Is.EqualTo(stages[^1].GetProperty("bytes").GetInt64() + root.GetProperty("adapter_bytes").GetInt64()));
        Assert.That(
            root.GetProperty("parallel_plans")[0].GetProperty("plans").EnumerateArray().Select(p => p.GetProperty("Name").GetString()),
            Does.Contain("R1"));
    }

    [TestCase("--shape tiny --modules down_proj,down_proj", "named twice")]
    [TestCase("--shape tiny --modules fc1", "known are q_proj")]
    [TestCase("--shape tiny --rank 0", "1 to 64")]
    [TestCase("--shape tiny --modules k_proj --rank 33", "1 to 32")]
    [TestCase("--shape tiny --method adapter --rank 65", "1 to 64")]
    [TestCase("--shape tiny --method dora", "lora, adapter and ia3")]
    [TestCase("--shape tiny --ranks 3", "possible are 1, 2")]
    [TestCase("--shape tiny --budget 1kg", "12.5GB")]
    [TestCase("--shape tiny --budget -1GB", "12.5GB")]
    [TestCase("--shape tiny --budget 1000", "together")]
    [TestCase("--shape tiny --tokens 4096", "1 to 2048")]
    [TestCase("--shape tiny --bytes 8", "2 or 4")]
    [TestCase("--shape tiny --save-bf16", "elements of 4")]
    [TestCase("--shape tiny --layer 4", "layers 0 to 3")]
    [TestCase("--shape tiny --machine abacus", "a100, h100, cpu")]
    [TestCase("--shape tiny --weights f32", "no option")]
    [TestCase("--shape gpt-2", "llama-3.1-8b")]
    [TestCase("--tokens 64", "either --config FILE or --shape NAME")]
    [TestCase("--shape tiny --config x", "either --config FILE or --shape NAME")]
    [TestCase("--config nowhere", "does not exist")]
    [TestCase("--ablation --tokens 5", "it takes --json")]
    [TestCase("--shape tiny --dot", "needs a value")]
    public void Run_BadArguments_AreRefusedWithWhatWouldDo(string arguments, string advice) => Assert.That(
        () => Plan(arguments.Split(' ')),
        Throws.InstanceOf<ArgumentException>().Or.InstanceOf<FlexLlmException>().With.Message.Contains(advice));

    [TestCase("1500", 1500)]
    [TestCase("1.5GB", 1_500_000_000)]
    [TestCase("2gib", 2147483648)]
    [TestCase("0.5MiB", 524288)]
    public void Bytes_WithAndWithoutUnit(string text, long bytes) =>
        Assert.That(CommandLine.Bytes(["--budget", text], "--budget"), Is.EqualTo(bytes));

    private static string Plan(params string[] arguments)
    {
        var output = new StringWriter { NewLine = "\n" };
        Assert.That(PlanVerb.Run(arguments, output), Is.Zero);
        return output.ToString();
    }

    [GeneratedRegex("in [0-9]+ ms")]
    private static partial Regex CompileTime();
}
