using FlexLLM.Engine;
using FlexLLM.Scheduling;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>Saved latency profiles: they are used again, or named in a warning and ignored.</summary>
[DeviceFixture]
internal sealed class LatencyProfileFileTests
{
    private static readonly LatencyModel Model = LatencyModel.Default with
    {
        Coefficients = LatencyModel.Default.Coefficients.With(LatencyTerm.RowsTo64, 1.0 / 3.0),
        Correction = 0.7,
        Tail = 1.25,
    };

    private readonly WarningLog _log = new();
    private DirectoryInfo _folder = null!;

    [SetUp]
    public void SetUp()
    {
        _folder = Directory.CreateTempSubdirectory("flexllm-profile-");
        _log.Warnings.Clear();
    }

    [TearDown]
    public void TearDown() => _folder.Delete(recursive: true);

    [Test]
    public void TryLoad_AfterSave_IsTheSameModel()
    {
        LatencyProfileFile file = File("a shape");
        Assert.That(file.TryLoad(), Is.Null);

        file.Save(Model);

        Assert.That(File("a shape").TryLoad(), Is.EqualTo(Model));
        Assert.That(File("another shape").TryLoad(), Is.Null);
        Assert.That(_log.Warnings, Is.Empty);
    }

    [Test]
    public void TryLoad_FileOfAnotherShapeUnderThisName_IsNamedAndIgnored()
    {
        File("another shape").Save(Model);
        System.IO.File.Move(File("another shape").Path, File("a shape").Path);

        Assert.That(File("a shape").TryLoad(), Is.Null);
        Assert.That(_log.Warnings.Single(), Does.Contain(File("a shape").Path).And.Contain("key").And.Contain("another shape"));
    }

    [TestCase("\"Step\": 0.005", "\"Step\": -1", "seconds.Step")]
    [TestCase("\"Step\": 0.005", "\"Step\": 1e999", "seconds.Step")]
    [TestCase("\"Head\"", "\"Hat\"", "seconds.Head")]
    [TestCase("\"tail\": 1.25", "\"tail\": 0.5", "tail")]
    [TestCase("\"correction\": 0.7", "\"correction\": \"much\"", "correction")]
    [TestCase("\"version\": 2", "\"version\": 1", "version")]
    [TestCase("flexllm-latency", "something", "format")]
    [TestCase("{", "", "JSON")]
    public void TryLoad_BrokenFile_IsNamedAndIgnored(string text, string broken, string field)
    {
        LatencyProfileFile file = File("a shape");
        file.Save(Model);
        string json = System.IO.File.ReadAllText(file.Path);
        int at = json.IndexOf(text, StringComparison.Ordinal);
        Assert.That(at, Is.GreaterThanOrEqualTo(0));
        System.IO.File.WriteAllText(file.Path, json.Remove(at, text.Length).Insert(at, broken));

        Assert.That(file.TryLoad(), Is.Null);
        Assert.That(_log.Warnings.Single(), Does.Contain(file.Path).And.Contain(field));
    }

    [Test]
    public void Save_FolderThatIsAFile_IsAWarning()
    {
        string path = Path.Combine(_folder.FullName, "file");
        System.IO.File.WriteAllText(path, "");

        new LatencyProfileFile(path, "a shape", _log).Save(Model);

        Assert.That(_log.Warnings, Has.Count.EqualTo(1));
    }

    [Test]
    public async Task Engine_SecondLoad_StartsWithWhatTheFirstHasLearnt()
    {
        using var model = new TinyModel(ModelArchitecture.Llama);
        var options = new CoServingOptions
        {
            LatencyProfileFolder = _folder.FullName,
            Logger = _log,
            ProfilingTimeMax = TinyModel.ProfilingTime,
        };
        LatencyModel learnt;
        await using (CoServingEngine first = await model.StartAsync(options))
        {
            await first.CompleteAsync(new GenerationRequest(TinyModel.Ids(40, 1)) { MaxTokens = 8, IgnoreEos = true }).Soon();
            learnt = await first.CallAsync(loop => loop.Latency, CancellationToken.None).Soon();
        }

        await using CoServingEngine second = await model.StartAsync(options);
        LatencyModel read = await second.CallAsync(loop => loop.Latency, CancellationToken.None).Soon();
        Assert.That(read, Is.EqualTo(learnt with { Drift = 0.0, Followed = 0 }));
        Assert.That(_log.Warnings, Is.Empty);
    }

    /// <summary>Profiling borrows a job's memory: the engine must hold afterwards what it would hold without.</summary>
    [Test]
    public async Task Engine_AfterProfiling_HoldsNoMoreThanWithout([Values] bool hasRoom)
    {
        using var model = new TinyModel(ModelArchitecture.Qwen2);
        long without = await BytesAsync(new CoServingOptions { ProfilingTimeMax = TimeSpan.Zero });
        long with = await BytesAsync(
            new CoServingOptions { DeviceBytesMax = hasRoom ? null : without, ProfilingTimeMax = TinyModel.ProfilingTime });

        Assert.That(with, Is.EqualTo(without));

        async Task<long> BytesAsync(CoServingOptions options)
        {
            await using CoServingEngine engine = await model.StartAsync(options);
            return (await engine.GetStatisticsAsync().Soon()).DeviceBytes;
        }
    }

    private LatencyProfileFile File(string key) => new(_folder.FullName, key, _log);
}
