using System.Text.Json;
using FlexLLM.Benchmarks;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>The `latency` verb on a tiny model, and what `latency` and `serve` say to bad arguments.</summary>
[TestFixture]
internal sealed class VerbTests
{
    [Test]
    public void Latency_TinyModel_ReportsTheErrorOfHeldOutSteps()
    {
        using var model = new TinyModel(ModelArchitecture.Llama);
        string json = Path.Combine(TestContext.CurrentContext.WorkDirectory, $"latency-{Guid.NewGuid():N}.json");
        var output = new StringWriter();

        int code = LatencyVerb.Run(
            ["--model", model.Folder, "--steps", "20", "--time-ms", "200", "--context", "64", "--json", json], output);

        Assert.That(code, Is.Zero);
        Assert.That(output.ToString(), Does.Match(@"median\s+p95\s+p99\s+above").And.Contains("as profiled").And.Contains("learning"));
        using JsonDocument report = JsonDocument.Parse(File.ReadAllText(json));
        File.Delete(json);
        foreach (string kind in new[] { "as_profiled", "learning" })
        {
            JsonElement errors = report.RootElement.GetProperty(kind);
            double[] percentiles =
                [.. new[] { "error_median", "error_p95", "error_p99" }.Select(name => errors.GetProperty(name).GetDouble())];
            Assert.That(errors.GetProperty("steps").GetInt32(), Is.EqualTo(20));
            Assert.That(percentiles, Is.Ordered.Ascending.And.All.GreaterThanOrEqualTo(0.0));
            Assert.That(percentiles[2], Is.GreaterThan(0.0), "no clock is as exact as that");
        }
    }

    [TestCase("--model", "x", "--shape", "smollm2-135m", "exclude each other")]
    [TestCase("--shape", "smollm2-135m", "--device", "cuda:0", "needs --backend torch")]
    [TestCase("--shape", "smollm2-135m", "--steps", "0", "--steps")]
    [TestCase("--shape", "no-such-shape", "--steps", "1", "no-such-shape")]
    [TestCase("--steps", "1", "--seed", "1", "--model or --shape is missing")]
    public void Latency_BadArgument_IsNamed(string name, string value, string other, string otherValue, string fault) => Assert.That(
        () => LatencyVerb.Run([name, value, other, otherValue], TextWriter.Null),
        Throws.InstanceOf<ArgumentException>().With.Message.Contains(fault));

    [TestCase("--modes", "co-serving,none", "none")]
    [TestCase("--loads", "huge", "--loads: 'huge'")]
    [TestCase("--rates", "0", "--rates")]
    [TestCase("--tpot-ms", "-1", "--tpot-ms")]
    [TestCase("--backend", "gpu", "--backend: 'gpu'")]
    [TestCase("--speed", "9", "--speed")]
    public void Serve_BadArgument_IsNamed(string name, string value, string fault) => Assert.That(
        () => ServeVerb.Run(["--model", "x", name, value]),
        Throws.InstanceOf<ArgumentException>().With.Message.Contains(fault));

    [Test]
    public void Serve_TraceThatIsMissing_IsNamedBeforeAnythingIsMeasured()
    {
        using var model = new TinyModel(ModelArchitecture.Llama);
        Assert.That(
            () => ServeVerb.Run(["--model", model.Folder, "--trace", "nowhere.csv"]),
            Throws.TypeOf<InvalidFileException>().With.Message.Contains("nowhere.csv"));
    }
}
