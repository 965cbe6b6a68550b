using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

[DeviceFixture]
internal sealed class OptionsTests
{
    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Llama);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    private static IEnumerable<TestCaseData> OutOfRange()
    {
        yield return Case(new CoServingOptions { WeightType = DType.F16 }, "WeightType");
        yield return Case(new CoServingOptions { ContextTokensMax = 1 }, "ContextTokensMax");
        yield return Case(new CoServingOptions { ContextTokensMax = 257 }, "ContextTokensMax above the checkpoint");
        yield return Case(new CoServingOptions { KvCacheTokens = 15 }, "KvCacheTokens");
        yield return Case(new CoServingOptions { KvCacheTokensMin = 15 }, "KvCacheTokensMin");
        yield return Case(new CoServingOptions { KvCacheTokens = 256, KvCacheTokensMin = 257 }, "KvCacheTokensMin above KvCacheTokens");
        yield return Case(new CoServingOptions { DeviceBytesMax = 0 }, "DeviceBytesMax");
        yield return Case(new CoServingOptions { TokensPerStepMax = 0 }, "TokensPerStepMax");
        yield return Case(new CoServingOptions { TokensPerStepMax = 8, SequencesMax = 9 }, "SequencesMax");
        yield return Case(new CoServingOptions { RequestsMax = 0 }, "RequestsMax");
        yield return Case(new CoServingOptions { JobsMax = 0 }, "JobsMax");
        yield return Case(new CoServingOptions { AdaptersMax = 0 }, "AdaptersMax");
        yield return Case(new CoServingOptions { InboxCapacity = 0 }, "InboxCapacity");
        yield return Case(new CoServingOptions { IdleStepMax = TimeSpan.Zero }, "IdleStepMax");
        yield return Case(new CoServingOptions { ProfilingTimeMax = TimeSpan.FromTicks(-1) }, "ProfilingTimeMax");
        yield return Case(new CoServingOptions { LatencyProfileFolder = " " }, "LatencyProfileFolder");
        yield return Case(
            new CoServingOptions { Slo = new ServiceLevelObjective { TimeToFirstToken = TimeSpan.Zero } }, "TimeToFirstToken");
        yield return Case(
            new CoServingOptions { BatchSlo = new ServiceLevelObjective { TimePerOutputToken = TimeSpan.Zero } },
            "TimePerOutputToken of batch requests");
        yield return Case(
            new CoServingOptions { Slo = new ServiceLevelObjective { InterTokenLatency = TimeSpan.Zero } }, "InterTokenLatency");
        yield return Case(new CoServingOptions { TenantWeights = new Dictionary<string, double> { ["x"] = 0.0 } }, "TenantWeights zero");
        yield return Case(
            new CoServingOptions { TenantWeights = new Dictionary<string, double> { ["x"] = -1.0 } }, "TenantWeights negative");
        yield return Case(
            new CoServingOptions { TenantWeights = new Dictionary<string, double> { ["x"] = double.NaN } }, "TenantWeights not a number");
        yield return Case(
            new CoServingOptions { TenantWeights = new Dictionary<string, double> { ["x"] = double.PositiveInfinity } },
            "TenantWeights infinite");

        static TestCaseData Case(CoServingOptions options, string name) =>
            new TestCaseData(options, name.Split(' ')[0]).SetArgDisplayNames(name);
    }

    [TestCaseSource(nameof(OutOfRange))]
    public async Task Load_OptionOutOfRange_NamesIt(CoServingOptions options, string name) => Assert.That(
        await CoServingEngine.LoadAsync(_model.Folder, options).FaultAsync(),
        Is.InstanceOf<ArgumentException>().With.Message.Contains(name));

    [Test]
    public void Validate_TenantWeight_NamesTheTenantAndTheRange()
    {
        var options = new CoServingOptions { TenantWeights = new Dictionary<string, double> { ["good"] = 2.0, ["bad"] = -0.5 } };

        Assert.That(
            options.Validate,
            Throws.TypeOf<ArgumentOutOfRangeException>().With.Property("ActualValue").EqualTo(-0.5)
                .And.Message.Contains("tenant 'bad' must be more than 0 and finite"));
    }

    [Test]
    public async Task Load_BadCheckpoint_NamesTheFile()
    {
        Exception? missing = await CoServingEngine.LoadAsync(_model["nowhere"]).FaultAsync();
        Assert.That(missing, Is.TypeOf<InvalidFileException>());
        using var model = new TinyModel(ModelArchitecture.Llama);
        string weights = Path.Combine(model.Folder, "model.safetensors");
        Weights.Change(weights, "model.norm.weight", _ => float.PositiveInfinity);
        Exception? infinite = await CoServingEngine.LoadAsync(model.Folder).FaultAsync();
        Assert.That(infinite, Is.TypeOf<InvalidFileException>().With.Property("Field").EqualTo("model.norm.weight"));
        (model.Config with { HiddenSize = 44 }).Save(model.Folder);
        Exception? shape = await CoServingEngine.LoadAsync(model.Folder).FaultAsync();
        Assert.That(shape, Is.TypeOf<InvalidFileException>().With.Property("File").EqualTo(weights));
    }

    [Test]
    public async Task Load_SmallContext_BoundsPromptsAndAnswers()
    {
        await using CoServingEngine engine = await _model.StartAsync(
            new CoServingOptions { ContextTokensMax = 20, KvCacheTokens = 16 });
        Assert.That(engine.ContextTokensMax, Is.EqualTo(20));
        GenerationResult answer = await engine.CompleteAsync(
            new GenerationRequest(TinyModel.Ids(9, 1)) { IgnoreEos = true }).Soon();
        Assert.That(answer.Tokens, Has.Count.EqualTo(7), "what the cache holds");
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        Assert.That((job.Samples, job.SkippedSamples), Is.EqualTo((4, 3)));
        await job.Completion.Soon();
    }

    [Test]
    public async Task Load_AsBf16_Serves()
    {
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { WeightType = DType.BF16 });
        await using CoServingEngine wide = await _model.StartAsync();
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes,
            Is.LessThan((await wide.GetStatisticsAsync().Soon()).DeviceBytes));
        Assert.That(await engine.AskAsync(Answers.Mixed(1, 8)[0]), Does.Contain("Length"));
    }

    [Test]
    public async Task Slo_BelowOneToken_IsRefusedOrServedByOption()
    {
        var impossible = new ServiceLevelObjective { TimePerOutputToken = TimeSpan.FromTicks(1) };
        var request = new GenerationRequest(TinyModel.Ids(4, 1)) { MaxTokens = 4, IgnoreEos = true };
        Exception? load = await CoServingEngine.LoadAsync(
            _model.Folder, new CoServingOptions { Slo = impossible, UnattainableSlo = UnattainableSlo.Refuse }).FaultAsync();
        Assert.That(load, Is.TypeOf<RequestRejectedException>().With.Message.Contains("TimePerOutputToken"));
        await using CoServingEngine warned = await _model.StartAsync(
            new CoServingOptions { Slo = impossible, ProfilingTimeMax = TinyModel.ProfilingTime });
        Assert.That((await warned.CompleteAsync(request).Soon()).Tokens, Has.Count.EqualTo(4));
        await using CoServingEngine strict = await _model.StartAsync(
            new CoServingOptions { UnattainableSlo = UnattainableSlo.Refuse, ProfilingTimeMax = TinyModel.ProfilingTime });
        Exception? own = await strict.CompleteAsync(request with { Slo = impossible }).FaultAsync();
        Assert.That(own, Is.TypeOf<RequestRejectedException>().With.Message.Contains("measured"));
        GenerationRequest batch = request with { Class = RequestClass.Batch, Tenant = "t" };
        Assert.That((await strict.CompleteAsync(batch).Soon()).Tokens, Has.Count.EqualTo(4));
    }
}
