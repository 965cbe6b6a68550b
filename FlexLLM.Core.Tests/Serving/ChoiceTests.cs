using FlexLLM.Benchmarks;
using FlexLLM.Benchmarks.Serving;
using NUnit.Framework;

namespace FlexLLM.Tests.Serving;

/// <summary>How the benchmarks read which device and which model are meant.</summary>
[TestFixture]
internal sealed class ChoiceTests
{
    [TestCase("", false, "cpu")]
    [TestCase("--backend cpu", false, "cpu")]
    [TestCase("--backend torch", true, "cpu")]
    [TestCase("--backend torch --device cuda", true, "cuda")]
    [TestCase("--device cuda:12 --backend torch", true, "cuda:12")]
    [TestCase("--device cuda:0,cuda:1 --backend torch", true, "cuda:0,cuda:1")]
    [TestCase("--device cpu,cpu", false, "cpu,cpu")]
    public void Parse_Device_IsWhatWasAskedFor(string line, bool isTorch, string name)
    {
        var device = DeviceChoice.Parse(Split(line));
        Assert.That(device, Is.EqualTo(new DeviceChoice(isTorch, name)));
        Assert.That(device.IsCuda, Is.EqualTo(name.StartsWith("cuda", StringComparison.Ordinal)));
    }

    [TestCase("--backend torch", false)]
    [TestCase("--backend torch --kv f32", false)]
    [TestCase("--kv bf16 --backend torch", true)]
    public void Parse_Kv_IsWhatWasAskedFor(string line, bool bf16) =>
        Assert.That(DeviceChoice.Parse(Split(line)), Is.EqualTo(new DeviceChoice(true, "cpu", bf16)));

    [TestCase("--backend torch --activations f32", false)]
    [TestCase("--activations bf16 --backend torch", true)]
    public void Parse_Activations_AreWhatWasAskedFor(string line, bool bf16) =>
        Assert.That(DeviceChoice.Parse(Split(line)), Is.EqualTo(new DeviceChoice(true, "cpu", Bf16Activations: bf16)));

    [TestCase("--backend cuda", "'cuda' is neither cpu")]
    [TestCase("--backend torch --kv f16", "'f16' is neither f32 nor bf16")]
    [TestCase("--kv bf16", "--kv bf16 needs --backend torch")]
    [TestCase("--activations bf16", "--activations bf16 needs --backend torch")]
    [TestCase("--backend torch --device gpu", "'gpu' is none of")]
    [TestCase("--backend torch --device cuda:", "'cuda:' is none of")]
    [TestCase("--backend torch --device cuda:-1", "'cuda:-1' is none of")]
    [TestCase("--device cuda:0", "needs --backend torch")]
    [TestCase("--device cpu,cuda:0", "needs --backend torch")]
    [TestCase("--backend torch --device cuda:0,", "'' is none of")]
    public void Parse_DeviceThatCannotBe_SaysWhatCan(string line, string message) =>
        Assert.That(() => DeviceChoice.Parse(Split(line)), Throws.ArgumentException.With.Message.Contains(message));

    [Test]
    public void Parse_Model_IsAFolderOrAShape()
    {
        Assert.That(ModelChoice.Parse(["--model", "a/b/"]), Is.EqualTo(new ModelChoice("a/b/", IsShape: false)));
        Assert.That(ModelChoice.Parse(["--shape", "tiny"]), Is.EqualTo(new ModelChoice("tiny", IsShape: true)));
        Assert.That(new[] { "a/b/", "tiny" }.Select((s, i) => new ModelChoice(s, i == 1).Name), Is.EqualTo(new[] { "b", "tiny (random)" }));
    }

    [TestCase("", "--model or --shape is missing")]
    [TestCase("--model a --shape tiny", "exclude each other")]
    [TestCase("--shape tinier", "'tinier' is no known model shape")]
    public void Parse_ModelThatCannotBe_SaysWhatCan(string line, string message) =>
        Assert.That(() => ModelChoice.Parse(Split(line)), Throws.ArgumentException.With.Message.Contains(message));

    [Test]
    public void Parse_ServingWithAShapeAndADevice_KeepsBothAndNeedsNoTrace()
    {
        var settings = ServeSettings.Parse(
            Split("--shape tiny --backend torch --device cuda:1 --device-bytes 60GiB --rates 1,5 --tpot-ms 50"));
        Assert.That(settings.Model, Is.EqualTo(new ModelChoice("tiny", IsShape: true)));
        Assert.That(settings.Device, Is.EqualTo(new DeviceChoice(true, "cuda:1")));
        Assert.That((settings.DeviceBytes, settings.Trace), Is.EqualTo((60L << 30, (string?)null)));
        Assert.That(settings.Describe(), Does.Contain(("backend", "torch, cuda:1")).And.Contain(("model", "tiny (random)")));
    }

    [Test]
    public void Drawn_Arrivals_HaveTheRateAndTheLengthsTheyShould()
    {
        var trace = ArrivalTrace.Drawn(seed: 1);
        Assert.That(trace.Rate, Is.EqualTo(20).Within(0.5));
        Assert.That(trace.MeanPromptTokens, Is.EqualTo(300).Within(20));
        Assert.That(trace.MeanAnswerTokens, Is.EqualTo(260).Within(15));
        Assert.That(trace.Arrivals.Select(a => a.Time), Is.Ordered);
        ArrivalTrace slice = trace.Scaled(5, 60, seed: 2);
        Assert.That(slice.Arrivals, Has.Count.EqualTo(300));
        Assert.That(ArrivalTrace.Drawn(1).Arrivals, Is.EqualTo(trace.Arrivals));
        Assert.That(ArrivalTrace.Drawn(2).Arrivals, Is.Not.EqualTo(trace.Arrivals), "Control: another seed draws others.");
    }

    private static string[] Split(string line) => line.Split(' ', StringSplitOptions.RemoveEmptyEntries);
}
