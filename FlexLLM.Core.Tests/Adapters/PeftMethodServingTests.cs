using FlexLLM.Adapters;
using FlexLLM.Formats;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Adapters;

/// <summary>Adapters of every method in one engine: trained, served side by side, written, read and trained further.</summary>
[DeviceFixture]
internal sealed class PeftMethodServingTests
{
    private static readonly (string Name, PeftConfig Method)[] Methods =
    [
        ("lora", new LoraConfig { Rank = 4, TargetModules = ["q_proj", "down_proj"] }),
        ("relu", new SerialAdapterConfig { Size = 6 }),
        ("silu", new SerialAdapterConfig { Size = 3, Activation = AdapterActivation.Silu, TargetModules = ["v_proj", "down_proj"] }),
        ("ia3", new Ia3Config()),
    ];

    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Qwen3);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Jobs_OfEveryMethod_LearnServeAndComeBackFromTheirFolders()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        var request = new GenerationRequest(TinyModel.Ids(9, 4)) { MaxTokens = 8, IgnoreEos = true };
        IReadOnlyList<int> bare = (await engine.CompleteAsync(request).Soon()).Tokens;
        foreach ((string name, PeftConfig method) in Methods)
        {
            await engine.Adapters.CreateAsync($"fresh {name}", method, seed: 2).Soon();
            Assert.That(
                (await engine.CompleteAsync(request with { Adapter = $"fresh {name}" }).Soon()).Tokens, Is.EqualTo(bare),
                $"a new {name} adapter answers like the bare model");
            FinetuningProgress end = await engine.TrainAsync(Jobs.Request(name) with
            {
                Method = method,
                Epochs = 12,
                Optimizer = new AdamWOptions { LearningRate = 3e-2f },
            });
            Assert.That(end.Status, Is.EqualTo(FinetuningStatus.Completed), name);
            byte[] saved = await Jobs.WeightsAsync(engine, name, _model[name]);
            AdapterInfo again = await engine.Adapters.LoadAsync($"{name} again", _model[name]).Soon();
            Assert.That(again.Config.ToString(), Is.EqualTo(method.ToString()));
            Assert.That(await Jobs.WeightsAsync(engine, $"{name} again", _model[$"{name} again"]), Is.EqualTo(saved));
        }

        // Each alone, then all at once: the same tokens.
        Dictionary<string, IReadOnlyList<int>> alone = [];
        foreach ((string name, _) in Methods)
        {
            alone[name] = (await engine.CompleteAsync(request with { Adapter = name }).Soon()).Tokens;
        }

        IEnumerable<string> names = Methods.SelectMany(m => new[] { m.Name, $"{m.Name} again" });
        Task<GenerationResult>[] together = [.. names.Select(n => engine.CompleteAsync(request with { Adapter = n }))];
        GenerationResult[] results = await Task.WhenAll(together).Soon();
        for (int i = 0; i < results.Length; i++)
        {
            Assert.That(results[i].Tokens, Is.EqualTo(alone[Methods[i / 2].Name]), Methods[i / 2].Name);
        }

        Assert.That(alone.Values, Has.Some.Not.EqualTo(bare), "training changed an answer");
    }

    [Test]
    public async Task Job_OfAnotherMethodThanTheAdapter_IsRefused()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        await engine.Adapters.CreateAsync("a", Methods[1].Method).Soon();
        RequestRejectedException error = Assert.ThrowsAsync<RequestRejectedException>(
            () => engine.StartFinetuningAsync(Jobs.Request("a") with { Method = Methods[3].Method }))!;
        Assert.That(error.Message, Does.Contain("serial Adapter size 6"));
        FinetuningProgress end = await engine.TrainAsync(Jobs.Request("a") with { Method = null });
        Assert.That(end.Status, Is.EqualTo(FinetuningStatus.Completed));
    }

    [Test]
    public async Task Job_WithLittleRoomForActivations_HasTheSameBitsOrIsRefused()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        await engine.TrainAsync(Jobs.Request("roomy"));
        await engine.TrainAsync(Jobs.Request("tight") with { SavedBytesMax = 40_000 });
        await engine.TrainAsync(Jobs.Request("lossy") with { SavesAsBF16 = true });
        byte[] roomy = await Jobs.WeightsAsync(engine, "roomy", _model["roomy"]);
        Assert.That(await Jobs.WeightsAsync(engine, "tight", _model["tight"]), Jobs.SameAs(roomy));
        Assert.That(await Jobs.WeightsAsync(engine, "lossy", _model["lossy"]), Is.Not.EqualTo(roomy), "bfloat16 is not exact");
        RequestRejectedException error = Assert.ThrowsAsync<RequestRejectedException>(
            () => engine.StartFinetuningAsync(Jobs.Request("no room") with { SavedBytesMax = 1000 }))!;
        Assert.That(error.Message, Does.Contain("at least"));
    }

    [Test]
    public async Task Folder_OfEachMethod_HasItsNamesAndShapes()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        foreach ((string name, string tensor, long[] shape) in ((string, string, long[])[])
        [
            ("relu", "self_attn.o_proj.adapter_down.weight", [6, 48]),
            ("relu", "mlp.down_proj.adapter_up.weight", [48, 6]),
            ("relu", "mlp.down_proj.adapter_up.bias", [48]),
            ("ia3", "self_attn.k_proj.ia3_l", [36, 1]),
            ("ia3", "mlp.down_proj.ia3_l", [1, 100]),
        ])
        {
            await engine.Adapters.CreateAsync($"{name} {tensor}", Methods.Single(m => m.Name == name).Method).Soon();
            await engine.Adapters.SaveAsync($"{name} {tensor}", _model["shapes"]).Soon();
            using SafetensorsFile file = SafetensorsFile.Open(Path.Combine(_model["shapes"], PeftFolder.WeightsFileName));
            Assert.That(file.Get($"base_model.model.model.layers.1.{tensor}").Shape, Is.EqualTo(shape), tensor);
        }
    }

    private static IEnumerable<TestCaseData> Refused()
    {
        yield return new TestCaseData(new SerialAdapterConfig { Size = 0 }, "Size");
        yield return new TestCaseData(new SerialAdapterConfig { Size = 49 }, "1 to 48");
        yield return new TestCaseData(new SerialAdapterConfig { TargetModules = ["norm"] }, "norm");
        yield return new TestCaseData(new SerialAdapterConfig { Size = 4, Activation = (AdapterActivation)7 }, "Activation");
        yield return new TestCaseData(new Ia3Config { FeedforwardModules = ["k_proj"] }, "only o_proj and down_proj");
        yield return new TestCaseData(new Ia3Config { TargetModules = ["k_proj"] }, "in TargetModules too");
        yield return new TestCaseData(new Ia3Config { TargetModules = ["k_proj", "k_proj", "down_proj"] }, "twice");
    }

    [TestCaseSource(nameof(Refused))]
    public void Validate_DoesNotFit_SaysWhy(PeftConfig config, string words) =>
        Assert.That(() => PeftAdapter.Validate(config, _model.Config),
            Throws.TypeOf<RequestRejectedException>().With.Message.Contains(words));
}
