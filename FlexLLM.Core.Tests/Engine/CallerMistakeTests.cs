using System.Diagnostics.Metrics;
using FlexLLM.Tests.Support;
using Microsoft.Extensions.Logging;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>Law 6: what one caller does wrong costs that caller alone. After each mistake the engine answers the next request.</summary>
[DeviceFixture]
internal sealed class CallerMistakeTests
{
    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Llama);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task Slo_Endless_IsServed()
    {
        var endless = new ServiceLevelObjective { TimePerOutputToken = TimeSpan.MaxValue, TimeToFirstToken = TimeSpan.MaxValue };
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { Slo = endless });
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        await AnswersAsync(engine);
        await job.Completion.Soon();
    }

    [Test]
    public async Task Job_OutOfRange_IsRefusedByFieldAndRange()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        foreach (double weight in (double[])[0.0, -1.0, double.NaN, double.PositiveInfinity, double.NegativeInfinity])
        {
            await RefusesAsync(Jobs.Request("j") with { Weight = weight }, "FinetuningRequest.Weight", "positive, finite");
        }

        foreach (int priority in (int[])[-9, 9, int.MinValue, int.MaxValue])
        {
            await RefusesAsync(Jobs.Request("j") with { Priority = priority }, "FinetuningRequest.Priority", "-8 to 8");
        }

        foreach (int priority in (int[])[-8, 8])
        {
            FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { Priority = priority, Weight = 1e-9 }).Soon();
            await job.Completion.Soon();
        }

        await AnswersAsync(engine);

        async Task RefusesAsync(FinetuningRequest request, string field, string range) => Assert.That(
            await engine.StartFinetuningAsync(request).FaultAsync(),
            Is.TypeOf<RequestRejectedException>().With.Message.StartsWith(field).And.Message.Contains(range));
    }

    [Test]
    public async Task Adapter_ConfigWithoutModules_IsRefused()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        Assert.That(
            async () => await engine.Adapters.CreateAsync("a", new LoraConfig { TargetModules = null! }).Soon(),
            Throws.InstanceOf<RequestRejectedException>());
        await AnswersAsync(engine);
    }

    [Test]
    public async Task Lists_ChangedAfterTheCall_ChangeNothing()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        List<string> modules = ["q_proj"];
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with
        {
            Method = new LoraConfig { Rank = 2, TargetModules = modules },
            PublishEverySteps = 1,
        }).Soon();
        modules.Add("v_proj");
        await job.Completion.Soon();
        IReadOnlyList<AdapterInfo> adapters = await engine.Adapters.ListAsync().Soon();
        Assert.That(adapters.Single().Config.TargetModules, Is.EqualTo(new[] { "q_proj" }));
        await AnswersAsync(engine);
    }

    [Test]
    public async Task Places_OfAnswersThatNobodyReads_AreGivenBack()
    {
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { RequestsMax = 1 });
        await using IAsyncEnumerator<GeneratedToken> idle = engine.GenerateAsync(Request()).GetAsyncEnumerator();
        await idle.MoveNextAsync().Soon(); // The rest stays unread.
        await AnswersAsync(engine);
    }

    [Test]
    public async Task Listener_ThatThrows_StopsNothing()
    {
        using var listener = new MeterListener();
        listener.InstrumentPublished = (instrument, self) =>
        {
            if (instrument.Name == "gen_ai.server.request.duration")
            {
                self.EnableMeasurementEvents(instrument);
            }
        };
        int thrower = 0;
        listener.SetMeasurementEventCallback<double>((_, _, _, _) =>
        {
            if (Interlocked.Increment(ref thrower) == 1)
            {
                throw new InvalidOperationException("A host's listener.");
            }
        });
        await using CoServingEngine engine = await _model.StartAsync();
        listener.Start();
        await AnswersAsync(engine);
        await AnswersAsync(engine);
        Assert.That(thrower, Is.Positive);
    }

    [Test]
    public async Task Logger_ThatThrows_StopsNothing()
    {
        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { Logger = new ThrowingLogger("ended") });
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        FinetuningProgress end = await job.Completion.Soon();
        Assert.That(end.Status, Is.EqualTo(FinetuningStatus.Completed));
        await AnswersAsync(engine);
    }

    [Test]
    public async Task Adapter_InTraining_IsNotTouched()
    {
        using var gate = new StepGate("FusedLinearCrossEntropy", 1);
        await using CoServingEngine engine = await _model.StartAsync(device: gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        Task[] calls = [engine.Adapters.UnloadAsync("j"), engine.Adapters.RenameAsync("j", "k"), engine.Adapters.LoadAsync("j", "nowhere")];
        gate.Open();
        foreach (Task call in calls)
        {
            Assert.That(await call.FaultAsync(), Is.InstanceOf<RequestRejectedException>());
        }

        await job.Completion.Soon();
    }

    [Test]
    public async Task Job_ThatDoesNotFit_IsRefusedWithATable()
    {
        long held;
        await using (CoServingEngine measured = await _model.StartAsync())
        {
            held = (await measured.GetStatisticsAsync().Soon()).DeviceBytes;
        }

        await using CoServingEngine engine = await _model.StartAsync(new CoServingOptions { DeviceBytesMax = held + 1000 });
        Assert.That(
            async () => await engine.StartFinetuningAsync(Jobs.Request("j")).Soon(),
            Throws.InstanceOf<RequestRejectedException>().With.Message.Contains("saved activations").And.Message.Contains("together"));
        await AnswersAsync(engine);
    }

    [Test]
    public void Engine_ThatDoesNotFit_IsRefused() => Assert.That(
        async () => await CoServingEngine.LoadAsync(_model.Folder, new CoServingOptions { DeviceBytesMax = 1000 }),
        Throws.InstanceOf<RequestRejectedException>().With.Message.Contains("KV cache").And.Message.Contains("together"));

    [Test]
    public async Task Checkpoint_OfTwoSteps_IsRefused()
    {
        using var gate = new StepGate("FusedLinearCrossEntropy", 8);
        await using CoServingEngine engine = await _model.StartAsync(device: gate.Device());
        gate.Arm();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j")).Soon();
        Task<int> first = job.SaveCheckpointAsync(_model["mixed"]);
        gate.Open();
        int step = await first.Soon();
        await job.Completion.Soon();

        // The weights of another step beside this step's optimizer: what a stop between two writes would leave.
        await engine.Adapters.SaveAsync("j", _model["mixed"]).Soon();
        await engine.Adapters.UnloadAsync("j").Soon();
        Exception? fault = await engine.StartFinetuningAsync(Jobs.Request("j") with { ResumeFrom = _model["mixed"] }).FaultAsync();
        Assert.That(fault, Is.InstanceOf<InvalidFileException>().With.Message.Contains($"of step {step}"));
    }

    [Test]
    public async Task Resume_WithOtherDataOfTheSameCount_IsRefused()
    {
        await using CoServingEngine engine = await _model.StartAsync();
        FinetuningJob job = await engine.StartFinetuningAsync(Jobs.Request("j") with { Epochs = 9000 }).Soon();
        await job.SaveCheckpointAsync(_model["data"]).Soon();
        await job.CancelAsync().Soon();
        FinetuningRequest other = Jobs.Request("j", seed: 2) with { Epochs = 9000, ResumeFrom = _model["data"] };
        Exception? fault = await engine.StartFinetuningAsync(other).FaultAsync();
        Assert.That(fault, Is.InstanceOf<InvalidFileException>().With.Property("Field").EqualTo("parameters"));
    }

    private static GenerationRequest Request() => new(TinyModel.Ids(4, 1)) { MaxTokens = 4, IgnoreEos = true };

    private static async Task AnswersAsync(CoServingEngine engine)
    {
        GenerationResult answer = await engine.CompleteAsync(Request()).Soon();
        Assert.That(answer.Tokens, Has.Count.EqualTo(4));
    }

    private sealed class ThrowingLogger(string word) : ILogger
    {
        public IDisposable? BeginScope<TState>(TState state)
            where TState : notnull => null;

        public bool IsEnabled(LogLevel logLevel) => true;

        public void Log<TState>(
            LogLevel logLevel, EventId eventId, TState state, Exception? exception, Func<TState, Exception?, string> formatter)
        {
            if (formatter(state, exception).Contains(word, StringComparison.Ordinal))
            {
                throw new InvalidOperationException("A host's logger.");
            }
        }
    }
}
