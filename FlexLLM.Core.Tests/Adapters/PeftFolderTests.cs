using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Adapters;

[DeviceFixture]
internal sealed class PeftFolderTests
{
    private TinyModel _model = null!;
    private IComputeBackend _backend = null!;
    private LoadedModel _loaded = null!;

    [OneTimeSetUp]
    public void SetUp()
    {
        _model = new TinyModel(ModelArchitecture.Llama);
        _backend = TestDevice.CreateBackend(1);
        _loaded = _model.Load(_backend);
    }

    [OneTimeTearDown]
    public void TearDown()
    {
        _loaded.Dispose();
        _backend.Dispose();
        _model.Dispose();
    }

    [TestCase("tiny-llama", "down_proj")]
    [TestCase("tiny-llama", "all")]
    [TestCase("tiny-qwen2", "all")]
    [TestCase("tiny-qwen3", "all")]
    public async Task LoadAndSave_OfPeftsOwnAdapters_KeepsEveryBit(string model, string variant)
    {
        string golden = SharedData.Require("golden", model);
        string adapter = Path.Combine(golden, $"adapter-{variant}");
        await using CoServingEngine engine = await CoServingEngine.LoadAsync(
            golden, new CoServingOptions { Device = TestDevice.Of(1) }).Soon();
        await engine.Adapters.LoadAsync("x", adapter).Soon();
        await engine.Adapters.SaveAsync("x", _model["round trip"]).Soon();
        Assert.That(
            Weights.BitsOf(Path.Combine(_model["round trip"], PeftFolder.WeightsFileName)),
            Is.EqualTo(Weights.BitsOf(Path.Combine(adapter, PeftFolder.WeightsFileName))));
    }

    [Test]
    public void Load_WrittenBySave_HasShapeAndScale()
    {
        var lora = new LoraConfig { Rank = 7, Alpha = 3, UseRsLora = true, TargetModules = ["up_proj", "o_proj"] };
        using PeftAdapter adapter = PeftFolder.Load(_model.WriteAdapter("shape", lora, 1), _loaded);
        Assert.That(((LoraConfig)adapter.Config).Rank, Is.EqualTo(7));
        Assert.That(adapter.Scale, Is.EqualTo(3 / MathF.Sqrt(7)));
        Assert.That(adapter.Modules, Is.EqualTo(new[] { AdapterModule.OProj, AdapterModule.UpProj }));
        Assert.That(adapter.SiteIndices, Is.EqualTo(new[] { 3, 5, 10, 12 }));
        Assert.That(adapter[4], Is.Null);
        Assert.That(adapter[5]!.Tensors[1].Spec.Wide, Is.EqualTo(100));
    }

    [TestCase("missing tensor", "lora_B.weight")]
    [TestCase("other rank", "lora_")]
    [TestCase("NaN", "lora_A.weight")]
    [TestCase("no weights", "file")]
    [TestCase("too many modules", "base_model.model")]
    [TestCase("unknown module", "r, target_modules")]
    public void Load_Malformed_NamesTheFieldAndFreesWhatWasLoaded(string fault, string field)
    {
        var lora = new LoraConfig { Rank = 4, TargetModules = ["q_proj", "v_proj"] };
        string folder = _model.WriteAdapter(fault, lora, 1);
        string path = Path.Combine(folder, PeftFolder.WeightsFileName);
        string config = Path.Combine(folder, "adapter_config.json");
        string tensor = PeftFolder.TensorName(AdapterSites.IndexOf(1, AdapterModule.VProj), 'A');
        switch (fault)
        {
            case "missing tensor":
                _model.WriteAdapter(fault, lora with { TargetModules = ["q_proj"] }, 1);
                Edit(config, "\"q_proj\"", "\"q_proj\", \"v_proj\"");
                field = "weight";
                break;
            case "other rank":
                Edit(config, "\"r\": 4", "\"r\": 3");
                break;
            case "NaN":
                Weights.Change(path, tensor, _ => float.NaN);
                break;
            case "no weights":
                File.Delete(path);
                break;
            case "too many modules":
                _model.WriteAdapter(fault, lora with { TargetModules = ["q_proj", "v_proj", "o_proj"] }, 1);
                Edit(config, ",\n    \"o_proj\"", string.Empty);
                break;
            default:
                Edit(config, "\"q_proj\"", "\"wqkv\"");
                break;
        }

        long before = _backend.AllocatedBytes;
        InvalidFileException error = Assert.Throws<InvalidFileException>(() => PeftFolder.Load(folder, _loaded).Dispose())!;
        Assert.That(error.Field, Does.Contain(field));
        Assert.That(error.File, Does.StartWith(folder));
        Assert.That(_backend.AllocatedBytes, Is.EqualTo(before));
    }

    // A text that is not there would make the case test nothing.
    private static void Edit(string path, string from, string to)
    {
        string text = File.ReadAllText(path);
        Assert.That(text, Does.Contain(from));
        File.WriteAllText(path, text.Replace(from, to, StringComparison.Ordinal));
    }

    [Test]
    public void Transpose_Twice_IsTheSame()
    {
        float[] matrix = [1, 2, 3, 4, 5, 6];
        float[] transposed = PeftFolder.Transpose(matrix, 2, 3);
        Assert.That(transposed, Is.EqualTo(new float[] { 1, 4, 2, 5, 3, 6 }));
        Assert.That(PeftFolder.Transpose(transposed, 3, 2), Is.EqualTo(matrix));
    }
}
