using System.Diagnostics;
using FlexLLM.Benchmarks;
using FlexLLM.Benchmarks.Serving;
using FlexLLM.Tests.Formats;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Serving;

/// <summary>The measurement of the serving verb on a tiny model. Times are what they are; counts and outcomes are asserted.</summary>
[DeviceFixture]
internal sealed class LiveServingTests
{
    private static readonly ServiceLevelObjective Slo = new()
    {
        TimePerOutputToken = TimeSpan.FromMinutes(1),
        TimeToFirstToken = TimeSpan.FromMinutes(1),
    };

    [TestCase("co-serving")]
    [TestCase("inference-only")]
    [TestCase("finetune-only")]
    [TestCase("split")]
    [TestCase("spatial")]
    public async Task MeasureAsync_Mode_ServesAndTrainsWhatItShould(string name)
    {
        using var model = new TinyModel(ModelArchitecture.Llama);
        ServeSettings settings = Settings(model);
        ServingMode mode = ServingMode.Parse(name);
        ArrivalTrace? trace = mode.Serves ? Trace().Scaled(30, settings.Seconds, seed: 1, lengths: settings.Lengths) : null;
        LiveServer server = await LiveServer.StartAsync(settings, mode, Slo);
        await using (server)
        {
            ServingRun run = await LiveRun.MeasureAsync(server, settings, trace, Slo, (name, "light"), _ => { });
            Assert.That(run.Requests.Select(r => (r.ArrivalTime, r.AnswerTokens)), Is.EqualTo(
                (trace?.Arrivals ?? []).Select(a => (a.Time, a.AnswerTokens))));
            Assert.That(run.Requests.Select(r => r.TokensGenerated), Is.EqualTo(run.Requests.Select(r => r.AnswerTokens)));
            Assert.That(run.Requests.Select(r => r.Ttft), Is.All.GreaterThan(0.0));
            Assert.That(run.Attainment, Is.EqualTo(1.0));
            Assert.That(run.TokensTrained, mode.Trains ? Is.GreaterThan(0) : Is.Zero);
            Assert.That(run.Seconds, Is.GreaterThanOrEqualTo(settings.Seconds));
            Assert.That(run.Series.Sum(p => p.GeneratedTokens), Is.EqualTo(run.TokensGenerated));
            Assert.That(run.Series.Sum(p => p.TrainedTokens), Is.EqualTo(run.TokensTrained));
        }
    }

    [Test]
    public async Task SendAsync_StoppedEarly_IsUnanswered()
    {
        using var model = new TinyModel(ModelArchitecture.Llama);
        LiveServer server = await LiveServer.StartAsync(Settings(model), ServingMode.Parse("inference-only"), Slo);
        await using (server)
        {
            var replay = new TraceReplay(server.Serving!, seed: 1);
            RequestOutcome outcome = await replay.SendAsync(
                new TraceArrival(0, 4, 8), Stopwatch.GetTimestamp(), new CancellationToken(canceled: true));
            Assert.That((outcome.TokensGenerated, outcome.Ttft, outcome.Attains(1e9, 1e9)), Is.EqualTo((0, (double?)null, false)));
            Assert.That((replay.Sent, replay.Answered), Is.EqualTo((1, 0)));
        }
    }

    [Test]
    public async Task Capacity_TinyModel_GivesTargetsAboveTheMinimum()
    {
        using var model = new TinyModel(ModelArchitecture.Llama);
        ServeSettings settings = Settings(model);
        LiveServer server = await LiveServer.StartAsync(settings, ServingMode.Parse("inference-only"), Slo);
        await using (server)
        {
            ArrivalTrace lengths = Trace().Scaled(5, 1, seed: 1, lengths: settings.Lengths);
            LiveCapacity capacity = await LiveCapacity.MeasureAsync(server.Serving!, lengths, settings, seconds: 0.5);
            Assert.That(capacity.GeneratedPerSecond, Is.GreaterThan(0));
            Assert.That(
                capacity.Targets(settings).TimePerOutputToken.TotalSeconds, Is.GreaterThan((2.9 * capacity.Tpot) - 1e-7), "less a tick");
            Assert.That(
                capacity.Targets(settings with { TpotTarget = 0.25, TtftTarget = 2 }),
                Is.EqualTo(new ServiceLevelObjective
                {
                    TimePerOutputToken = TimeSpan.FromMilliseconds(250),
                    TimeToFirstToken = TimeSpan.FromSeconds(2),
                }));
        }
    }

    [TestCase(0.0421, 0.043)]
    [TestCase(1.0, 1.0)]
    [TestCase(137.0, 140.0)]
    public void RoundUp_Value_HasTwoDigits(double value, double rounded) =>
        Assert.That(LiveCapacity.RoundUp(value), Is.EqualTo(rounded).Within(1e-9));

    [Test]
    public void Load_QuestionsAndAnswers_AreCutToTheLength()
    {
        using var folder = new TempFolder();
        using var model = new TinyModel(ModelArchitecture.Llama, withTokenizer: true);
        string file = folder.Write("data.jsonl", "{\"question\": \"What is it?\", \"answer\": \"It is a test, and long.\"}\n");
        string bad = folder.Write("bad.jsonl", "{\"question\": \"What?\", \"answer\": 3}\n");
        Tokenizer tokenizer = Tokenizer.Load(model.Folder);

        TrainingExample example = FinetuningData.Load(file, tokenizer, model.Config, 7, seed: 1).Read().Single().Example;

        Assert.That(example.Tokens, Is.EqualTo(tokenizer.Encode("What is it?")[..7]));
        Assert.That(
            () => FinetuningData.Load(bad, tokenizer, model.Config, 7, seed: 1),
            Throws.TypeOf<InvalidFileException>().With.Property(nameof(InvalidFileException.Field)).EqualTo("line 1"));
    }

    [Test]
    public void Parse_Modes_HaveTheirPolicies()
    {
        Assert.That(ServingMode.Parse("temporal-100").Policy, Is.EqualTo(SharingPolicy.Temporal(100)));
        Assert.That(ServingMode.Parse("fixed-budget-3").Policy, Is.EqualTo(SharingPolicy.FixedBudget(3)));
        string[] names = ServingMode.Defaults.Split(',');
        Assert.That(names.Select(name => ServingMode.Parse(name).Name), Is.EqualTo(names));
        Assert.That(() => ServingMode.Parse("temporal-0"), Throws.ArgumentException.With.Message.Contains("temporal-0"));
    }

    [Test]
    public void Parse_Arguments_GiveSettings()
    {
        string[] args = ["--model", "m", "--trace", "t.csv"];
        ServeSettings settings = ServeSettings.Parse(args);
        Assert.That(settings.Loads.Select(l => l.Name), Is.EqualTo(new[] { "light", "medium", "heavy" }));
        Assert.That((settings.ContextTokens, settings.ServingThreads, settings.TrainingThreads), Is.EqualTo((256, 1, 1)));
        Assert.That(ServeSettings.Parse([.. args, "--rates", "0.5,2"]).Rates, Is.EqualTo(new[] { 0.5, 2.0 }));
        Assert.That(ServeSettings.Parse([.. args, "--tpot-ms", "80"]).TpotTarget, Is.EqualTo(0.08));
        string[][] bad = [["--rates", "1", "--loads", "light"], ["--rates", "-1"], ["--loads", "some"], ["--nothing", "1"]];
        Assert.That(bad, Has.All.Matches<string[]>(more =>
            Assert.Throws<ArgumentException>(() => ServeSettings.Parse([.. args, .. more])) is not null));
    }

    private static ServeSettings Settings(TinyModel model) => new()
    {
        Model = new ModelChoice(model.Folder, IsShape: false),
        Open = TestDevice.Of,
        Trace = "trace.csv",
        Modes = [],
        Seconds = 0.4,
        DrainSeconds = 60,
        Lengths = new TraceLengths(MaxPrompt: 12, MaxAnswer: 4),
        Sequences = 4,
        StepTokens = 16,
        SampleTokens = 16,
    };

    // An arrival every quarter of a second.
    private static ArrivalTrace Trace()
    {
        IEnumerable<string> rows = Enumerable.Range(0, 40).Select(i =>
            $"2023-11-16 18:15:{10 + (i / 4)}.{i % 4 * 25:00},{i + 3},{(i % 6) + 1}");
        using var reader = new StringReader("TIMESTAMP,ContextTokens,GeneratedTokens\n" + string.Join('\n', rows));
        return ArrivalTrace.Read(reader, "trace.csv");
    }
}
