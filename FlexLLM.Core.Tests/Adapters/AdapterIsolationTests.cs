using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Adapters;

/// <summary>Law 4: no adapter changes an answer of another, and a request keeps the version it started with.</summary>
[DeviceFixture]
internal sealed class AdapterIsolationTests
{
    private static readonly string[] Everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    private TinyModel _model = null!;
    private GenerationRequest[] _requests = null!;
    private string[] _alone = null!;

    [OneTimeSetUp]
    public async Task SetUp()
    {
        _model = new TinyModel(ModelArchitecture.Qwen2, withTokenizer: true);
        _model.WriteAdapter("a", new LoraConfig { Rank = 4, TargetModules = ["q_proj", "v_proj"] }, seed: 1);
        _model.WriteAdapter("all", new LoraConfig { Rank = 9, Alpha = 4, TargetModules = Everything }, seed: 2);
        _model.WriteAdapter(
            "rs", new LoraConfig { Rank = 3, Alpha = 2, UseRsLora = true, TargetModules = ["down_proj"] }, seed: 3);
        _requests = Answers.Mixed(9, maxTokens: 16, "a", null, "all", "rs");
        await using CoServingEngine engine = await StartAsync();
        _alone = await engine.AskAloneAsync(_requests);
    }

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Adapters_AllInOneBatch_AnswerAsAlone([Values(1, 2)] int threads)
    {
        await using CoServingEngine engine = await StartAsync(TestDevice.Of(threads));
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(_alone));
    }

    [Test]
    public async Task Adapters_OfDifferentWeights_AnswerDifferently()
    {
        await using CoServingEngine engine = await StartAsync();
        var request = new GenerationRequest(TinyModel.Ids(9, 1))
        {
            MaxTokens = 8,
            Sampling = SamplingOptions.Greedy with { LogProbs = 1 },
        };
        string?[] names = [null, "a", "all", "rs"];
        string[] answers = await engine.AskTogetherAsync(names.Select(n => request with { Adapter = n }));
        Assert.That(answers, Is.Unique);
    }

    [Test]
    public async Task Training_OfAnother_ChangesNoAnswer()
    {
        await using CoServingEngine engine = await StartAsync();
        FinetuningRequest request = Jobs.Request("b") with
        {
            Epochs = 40,
            PublishEverySteps = 1,
            Method = new LoraConfig { Rank = 4, TargetModules = Everything },
        };
        FinetuningJob job = await engine.StartFinetuningAsync(request).Soon();
        int rounds = 0;
        do
        {
            Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(_alone));
            rounds++;
        }
        while (!job.Completion.IsCompleted && rounds < 3);

        await job.CancelAsync().Soon();
        Assert.That(await engine.AskTogetherAsync(_requests), Is.EqualTo(_alone));
    }

    [Test]
    public async Task Version_OfARequestInFlight_StaysWhateverHappensToItsName()
    {
        GenerationRequest request = _requests[0] with { MaxTokens = 40 };
        string expected;
        await using (CoServingEngine engine = await StartAsync())
        {
            expected = await engine.AskAsync(request);
        }

        using var gate = new StepGate("Logits", 4);
        await using CoServingEngine changing = await StartAsync(gate.Device());
        gate.Arm();
        Task<string> answer = Answers.OfAsync(changing, request);
        await gate.ReachedAsync();
        Task<AdapterInfo> replaced = changing.Adapters.LoadAsync(
            "a", _model.WriteAdapter("other", new LoraConfig { TargetModules = ["k_proj"] }, seed: 8));
        Task renamed = changing.Adapters.RenameAsync("a", "c");
        Task unloaded = changing.Adapters.UnloadAsync("c");
        Task<string> unknown = Answers.OfAsync(changing, request);
        gate.Open();
        await Task.WhenAll(replaced, renamed, unloaded).Soon();
        Assert.That((await replaced).Version, Is.EqualTo(2));
        Assert.That(await unknown.FaultAsync(), Is.InstanceOf<RequestRejectedException>());
        Assert.That(await answer.Soon(), Is.EqualTo(expected));
    }

    [Test]
    public async Task Version_PublishedMidway_ServesLaterRequestsAlone()
    {
        using var gate = new StepGate("AdamWStep", 1);
        await using CoServingEngine engine = await StartAsync(gate.Device());
        gate.Arm();
        GenerationRequest request = _requests[0] with { Adapter = "n", MaxTokens = 12 };
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("n") with { PublishEverySteps = 1 }).Soon();
        await gate.ReachedAsync();
        Task paused = job.PauseAsync();
        Task<string> trained = Answers.OfAsync(engine, request);
        gate.Open();
        await paused.Soon();
        string afterOneStep = await trained.Soon();
        string bare = await engine.AskAsync(request with { Adapter = null });
        Assert.That(afterOneStep, Is.Not.EqualTo(bare), "the first step's version is published");
        Assert.That(await engine.AskAsync(request), Is.EqualTo(afterOneStep), "a paused job publishes nothing");
        await job.CancelAsync().Soon();
        Assert.That(await engine.AskAsync(request), Is.EqualTo(afterOneStep), "published versions outlive their job");
    }

    [Test]
    public async Task Create_Fresh_AnswersLikeTheBareModel()
    {
        await using CoServingEngine engine = await StartAsync();
        AdapterInfo info = await engine.Adapters.CreateAsync(
            "fresh", new LoraConfig { Rank = 5, TargetModules = Everything }, seed: 4).Soon();
        GenerationRequest request = _requests[1] with { Adapter = null, Sampling = SamplingOptions.Greedy with { LogProbs = 1 } };
        Assert.That(info.Version, Is.EqualTo(1));
        Assert.That(await engine.AskAsync(request with { Adapter = "fresh" }), Is.EqualTo(await engine.AskAsync(request)));
    }

    [Test]
    public async Task SaveAndLoad_OfATrainedAdapter_AnswersTheSame()
    {
        await using CoServingEngine engine = await StartAsync();
        await engine.TrainAsync(Jobs.Request("t"));
        GenerationRequest request = _requests[0] with { Adapter = "t" };
        string before = await engine.AskAsync(request);
        byte[] saved = await Jobs.WeightsAsync(engine, "t", _model["saved"]);
        await engine.Adapters.UnloadAsync("t").Soon();
        AdapterInfo loaded = await engine.Adapters.LoadAsync("again", _model["saved"]).Soon();
        Assert.That(await engine.AskAsync(request with { Adapter = "again" }), Is.EqualTo(before));
        Assert.That(await Jobs.WeightsAsync(engine, "again", _model["saved again"]), Is.EqualTo(saved));
        Assert.That(((LoraConfig)loaded.Config).Rank, Is.EqualTo(4));
    }

    [Test]
    public async Task Names_LoadedRenamedUnloaded_AreListed()
    {
        await using CoServingEngine engine = await StartAsync();
        await engine.Adapters.RenameAsync("a", "z").Soon();
        await engine.Adapters.UnloadAsync("rs").Soon();
        await engine.Adapters.LoadAsync("all", _model["all"]).Soon();
        IReadOnlyList<AdapterInfo> list = await engine.Adapters.ListAsync().Soon();
        Assert.That(list.Select(i => (i.Name, i.Version)), Is.EqualTo(new[] { ("all", 2), ("z", 1) }));
        Assert.That(await engine.Adapters.RenameAsync("z", "all").FaultAsync(), Is.InstanceOf<RequestRejectedException>());
        Assert.That(await engine.Adapters.RenameAsync("a", "b").FaultAsync(), Is.InstanceOf<RequestRejectedException>());
        Assert.That(await engine.Adapters.UnloadAsync("a").FaultAsync(), Is.InstanceOf<RequestRejectedException>());
        Assert.That(await engine.Adapters.SaveAsync("a", _model["none"]).FaultAsync(), Is.InstanceOf<RequestRejectedException>());
        Assert.That(await engine.Adapters.CreateAsync("z", new LoraConfig()).FaultAsync(),
            Is.InstanceOf<RequestRejectedException>());
    }

    [Test]
    public async Task Unload_OfAnAdapterInUse_FreesItsMemoryAfterTheLastRequest()
    {
        using var gate = new StepGate("Logits", 2);
        await using CoServingEngine engine = await StartAsync(gate.Device());
        await engine.Adapters.UnloadAsync("all").Soon();
        await engine.Adapters.UnloadAsync("rs").Soon();
        await engine.AskAsync(_requests[0]);
        long with = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        gate.Arm();
        Task<string> answer = Answers.OfAsync(engine, _requests[0]);
        await gate.ReachedAsync();
        Task unloaded = engine.Adapters.UnloadAsync("a");
        Task<EngineStatistics> during = engine.GetStatisticsAsync();
        gate.Open();
        await unloaded.Soon();
        Assert.That((await during.Soon()).DeviceBytes, Is.EqualTo(with), "the request still needs it");
        await answer.Soon();
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.LessThan(with));
    }

    [Test]
    public async Task Store_WhenFull_RefusesAndFreesWhatItRefused()
    {
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { AdaptersMax = 1 });
        await engine.Adapters.LoadAsync("a", _model["a"]).Soon();
        long before = (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        Assert.That(await engine.Adapters.LoadAsync("rs", _model["rs"]).FaultAsync(), Is.InstanceOf<RequestRejectedException>());
        Assert.That(await engine.Adapters.CreateAsync("n", new LoraConfig()).FaultAsync(),
            Is.InstanceOf<RequestRejectedException>());
        Assert.That(await engine.StartFinetuningAsync(Jobs.Request("n")).FaultAsync(), Is.InstanceOf<RequestRejectedException>());
        Assert.That((await engine.GetStatisticsAsync().Soon()).DeviceBytes, Is.EqualTo(before));
        await engine.Adapters.LoadAsync("a", _model["rs"]).Soon();
    }

    private async Task<CoServingEngine> StartAsync(ComputeDevice? device = null)
    {
        CoServingEngine engine = await _model.StartAsync(device: device);
        foreach (string name in (string[])["a", "all", "rs"])
        {
            await engine.Adapters.LoadAsync(name, _model[name]).Soon();
        }

        return engine;
    }
}
