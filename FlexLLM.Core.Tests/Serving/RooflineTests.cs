using FlexLLM.Adapters;
using FlexLLM.Backends.Cpu;
using FlexLLM.Benchmarks;
using FlexLLM.Benchmarks.Serving;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Serving;

/// <summary>What tokens cost, counted by hand, and shares of what a device does at best.</summary>
[TestFixture]
internal sealed class RooflineTests
{
    private const int Tokens = 10;
    private static readonly Roofline Best = new(CopyBytesPerSecond: 100, F32FlopsPerSecond: 1000, BF16FlopsPerSecond: 4000);

    private TinyModel _folder = null!;
    private CpuBackend _backend = null!;
    private LoadedModel _model = null!;

    // Parameters of a layer's linear modules, and of the head.
    private double Layer => (2 * Hidden * (Queries + Keys)) + (3 * Hidden * Inner);

    private double Head => Hidden * TinyModel.Vocabulary;

    private double Hidden => _model.Config.HiddenSize;

    private double Inner => _model.Config.IntermediateSize;

    private double Queries => _model.Config.AttentionHeads * _model.Config.HeadDim;

    private double Keys => _model.Config.KeyValueHeads * _model.Config.HeadDim;

    private int Layers => _model.Config.LayerCount;

    [OneTimeSetUp]
    public void OneTimeSetUp()
    {
        _folder = new TinyModel(ModelArchitecture.Llama);
        _backend = new CpuBackend(1);
        _model = _folder.Load(_backend);
    }

    [OneTimeTearDown]
    public void OneTimeTearDown()
    {
        _model.Dispose();
        _backend.Dispose();
        _folder.Dispose();
    }

    [Test]
    public void Share_OfWhatTheDeviceDoesAtBest_IsARatioOfRates()
    {
        Assert.That(Best.ShareOfCopy(bytes: 100, seconds: 2), Is.EqualTo(0.5).Within(1e-12));
        Assert.That(Best.ShareOfMatrix(flops: 2000, seconds: 2, DType.F32), Is.EqualTo(1.0).Within(1e-12));
        Assert.That(Best.ShareOfMatrix(flops: 2000, seconds: 2, DType.BF16), Is.EqualTo(0.25).Within(1e-12), "Control: another roof.");
    }

    [Test]
    public void Of_Model_CountsWhatIsInIt()
    {
        var work = ModelWork.Of(_model);
        Assert.That(work.LinearFlopsPerRow, Is.EqualTo(2 * Layers * Layer));
        Assert.That(work.HeadFlopsPerRow, Is.EqualTo(2 * Head));
        Assert.That(work.WeightBytes, Is.AtLeast(4 * ((Layers * Layer) + Head)).And.AtMost(4.5 * ((Layers * Layer) + Head)), "Padded.");
        Assert.That(work.KvBytesPerPosition, Is.AtLeast(4 * 2 * Layers * Keys).And.AtMost(8 * 2 * Layers * Keys), "Padded.");
        Assert.That(work.DecodeBytes(3, 7), Is.EqualTo(work.WeightBytes + (21 * work.KvBytesPerPosition)));
    }

    [Test]
    public void PrefillFlops_Prompt_AttendsATriangle()
    {
        double pairs = Enumerable.Range(1, Tokens).Sum();
        double expected = (2 * Layers * Layer * Tokens) + (4 * Queries * Layers * pairs) + (2 * Head);
        Assert.That(ModelWork.Of(_model).PrefillFlops(Tokens), Is.EqualTo(expected));
        Assert.That(ModelWork.Of(_model).PrefillFlops(1), Is.EqualTo((2 * Layers * Layer) + (4 * Queries * Layers) + (2 * Head)));
    }

    // Of the lowest layer only the bypass is trained: at down_proj nothing below it, at q_proj nothing above the inputs of attention
    // is left out but the input gradients of q, k and v.
    [TestCase("down_proj", 0)]
    [TestCase("q_proj", 1)]
    public void TrainFlops_AdapterAtOneModule_GoesBackAsFarAsTheProgram(string module, int layersOfAttention)
    {
        var lora = new LoraConfig { Rank = 4, TargetModules = [module] };
        var program = _model.CompileTraining(PeftAdapter.NetworksOf(lora, _model.Config));
        double lowest = module == "down_proj" ? 0 : (Queries * Hidden) + (3 * Hidden * Inner);
        double attention = 4 * Queries * ModelWork.Pairs(Tokens);
        double expected = (Tokens * 2 * ((Layers * Layer) + (2 * Head) + ((Layers - 1) * Layer) + lowest)) +
            (attention * (Layers + (2.5 * (Layers - 1 + layersOfAttention))));
        Assert.That(ModelWork.Of(_model).TrainFlops(Tokens, _model, program), Is.EqualTo(expected).Within(1e-9 * expected));
    }

    // 32 layers of 218.1 million weights, and a head of 525.3: the table of embeddings is looked up, not read.
    [Test]
    public void RooflineCalls_EightBillionWeights_AreReadAtABandwidth()
    {
        double weights = (32.0 * ((4096 * (4096 + 1024)) + (4096 * (1024 + 4096)) + (3 * 4096 * 14336))) + (4096.0 * 128256);
        Assert.That(RooflineCalls.WeightBytes, Is.EqualTo(2 * weights));
        var calls = new RooflineCalls(1, 0, new Spread(0.003, 0.002, 0.004), new Spread(1, 1, 1), TensorsMade: 1, ManagedBytes: 1);
        Assert.That(calls.ShareAt(RooflineCalls.WeightBytes / 0.006), Is.EqualTo(0.5).Within(1e-12), "The median of the calls alone.");
    }

    [Test]
    public void ServingCosts_Run_IsAShareOfBothRates()
    {
        var costs = new ServingCosts(
            Best, DType.F32, WeightBytes: 50, FlopsPerPromptToken: 1, FlopsPerGeneratedToken: 2, FlopsPerTrainedToken: 6);
        var run = new ServingRun
        {
            Mode = "co-serving",
            Load = "light",
            RequestsPerSecond = 1,
            Seconds = 10,
            TtftTarget = 1,
            TpotTarget = 1,
            Requests = [],
            TokensGenerated = 100,
            TokensTrained = 300,
            Steps = 4,
            FinetuningSteps = 0,
            StepsOverBudget = 0,
            Preemptions = 0,
            Series = [new ThroughputPoint(0, 400, 60, 300), new ThroughputPoint(5, 100, 40, 0)],
        };
        Assert.That(costs.DecodeSecondsMin, Is.EqualTo(0.5));
        Assert.That(costs.ShareOfMatrix(run), Is.EqualTo((500 + 200 + 1800) / 10.0 / 1000).Within(1e-12));
        Assert.That(costs.ShareOfCopy(run), Is.EqualTo(4 * 50 / 10.0 / 100).Within(1e-12));
        Assert.That(costs.ShareOfMatrix(run with { TokensTrained = 0 }), Is.EqualTo(0.07).Within(1e-12), "Control: without finetuning.");
    }
}
