using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Formats;
using FlexLLM.Graph;
using FlexLLM.Graph.Parallelization;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Tests.Backends.Group;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>
/// Every plan that the search finds, executed on a group of ranks: logits, gradients and ten optimizer steps are those of one
/// device, and the bits are the same in every run.
/// </summary>
[DeviceFixture]
internal sealed class GroupTrainingTests
{
    private const double Bound = 1e-5;
    private const int Steps = 10;
    private const int Rows = 48;

    private static readonly ModelConfig Config = new()
    {
        Architecture = ModelArchitecture.Qwen2,
        HiddenSize = 64,
        IntermediateSize = 96,
        LayerCount = 2,
        AttentionHeads = 8,
        KeyValueHeads = 4,
        HeadDim = 8,
        VocabularySize = 120,
        MaxPositions = 64,
        EosTokenIds = [1],
    };

    private static readonly (string Name, PeftConfig Config)[] Methods =
    [
        ("lora", new LoraConfig { Rank = 8, Alpha = 12, TargetModules = PeftConfig.AllModules }),
        ("serial relu", new SerialAdapterConfig { Size = 8, TargetModules = ["o_proj", "down_proj"] }),
        ("serial silu", new SerialAdapterConfig
        {
            Size = 8,
            Activation = AdapterActivation.Silu,
            TargetModules = ["o_proj", "down_proj", "v_proj"],
        }),
        ("ia3", new Ia3Config
        {
            TargetModules = ["k_proj", "v_proj", "o_proj", "down_proj"],
            FeedforwardModules = ["down_proj", "o_proj"],
        }),
    ];

    private string _folder = null!;

    [OneTimeSetUp]
    public void SetUp()
    {
        _folder = Directory.CreateTempSubdirectory("flexllm-group-").FullName;
        RandomCheckpoint.Write(_folder, Config, DType.F32, seed: 3, deviation: 0.15f);
    }

    [OneTimeTearDown]
    public void TearDown() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void Group_EveryPlanOfEveryTap_EqualsOneDevice(
        [Values("lora", "serial relu", "serial silu", "ia3")] string method, [Values(1, 2, 4)] int ranks)
    {
        PeftConfig config = Methods.Single(m => m.Name == method).Config;
        Result expected = OnOneDevice(config);
        var tried = new HashSet<string>();
        for (int choice = 0; choice < 64; choice++)
        {
            // Plan number choice of every tap at once, until each has had all of its own.
            var names = new HashSet<string>();
            bool isNew = false;
            Result actual = OnGroup(config, ranks, Choose);
            if (!isNew)
            {
                break;
            }

            string context = $"{method} on {ranks} ranks: {string.Join("; ", names)}";
            Assert.That(Distance(actual.Logits, expected.Logits), Is.LessThan(Bound), $"logits, {context}");
            Assert.That(actual.Loss, Is.EqualTo(expected.Loss).Within(Bound), $"loss, {context}");
            foreach ((string name, float[] values) in expected.Gradients)
            {
                Assert.That(Distance(actual.Gradients[name], values), Is.LessThan(Bound), $"gradient of {name}, {context}");
            }

            foreach ((string name, float[] values) in expected.Weights)
            {
                Assert.That(Distance(actual.Weights[name], values), Is.LessThan(Bound), $"{name} after {Steps} steps, {context}");
            }

            BypassPlan Choose(BypassTap tap, Bypass bypass)
            {
                IReadOnlyList<BypassPlan> plans = PlanEnumerator.Enumerate(bypass, tap, ranks, SearchRules.Full);
                BypassPlan plan = plans[Math.Min(choice, plans.Count - 1)];
                lock (names)
                {
                    names.Add($"{tap.Name} {plan}");
                    isNew |= tried.Add($"{tap.Name} {bypass.InputWidth} {bypass.OutputWidth} {plan}");
                }

                return plan;
            }
        }

        TestContext.Out.WriteLine($"{tried.Count} plans of {method} on {ranks} ranks");
        Assert.That(tried, Has.Count.GreaterThan(method == "ia3" ? 1 : 4));
    }

    [Test]
    public void Group_TwoRuns_GiveTheSameBits([Values("lora", "serial relu")] string method)
    {
        PeftConfig config = Methods.Single(m => m.Name == method).Config;
        Result first = OnGroup(config, 4, Last);
        Result second = OnGroup(config, 4, Last);
        ExpectSame(second, first, "another run");
    }

    [Test]
    public void Group_ThroughTheHost_HasTheBitsOfOneFromMemoryToMemory([Values("lora", "serial relu")] string method)
    {
        PeftConfig config = Methods.Single(m => m.Name == method).Config;
        ExpectSame(OnGroup(config, 4, Last, isDirect: false), OnGroup(config, 4, Last), "through the host");
    }

    [ManagedOnly("the same bits when rows are computed again beside others")]
    [Test]
    public void Group_UnderABudget_HasTheBitsOfOneWithout(
        [Values("lora", "serial relu", "serial silu", "ia3")] string method, [Values(2, 4)] int ranks, [Range(0, 5)] int choice)
    {
        PeftConfig config = Methods.Single(m => m.Name == method).Config;
        Result expected = OnGroup(config, ranks, Choose);
        foreach (int budget in new[] { 0, 64, 200 })
        {
            Result actual = OnGroup(config, ranks, Choose, new CompilerOptions
            {
                Rematerialization = new RematerializationOptions { SavedColumnsMax = budget },
            });
            ExpectSame(actual, expected, $"budget {budget}");
        }

        BypassPlan Choose(BypassTap tap, Bypass bypass)
        {
            IReadOnlyList<BypassPlan> plans = PlanEnumerator.Enumerate(bypass, tap, ranks, SearchRules.Full);
            return plans[Math.Min(choice, plans.Count - 1)];
        }
    }

    [Test]
    public void Group_DegreeThatDoesNotDivide_IsRefusedWithThoseThatDo()
    {
        RequestRejectedException error = Assert.Throws<RequestRejectedException>(() => ModelShard.LocalConfig(Config, 3))!;
        Assert.That(error.Message, Does.Contain("1, 2, 4"));
    }

    private static BypassPlan Last(BypassTap tap, Bypass bypass) => PlanEnumerator.Enumerate(bypass, tap, 4, SearchRules.Full)[^1];

    // Bits, where the device promises them. On the CPU libtorch gives the same bits too, as it happens.
    private static void ExpectSame(Result actual, Result expected, string context)
    {
        Expect("logits", actual.Logits, expected.Logits);
        Assert.That(actual.Loss, Is.EqualTo(expected.Loss).Within(TestDevice.Tolerance), $"loss, {context}");
        foreach ((string name, float[] values) in expected.Weights)
        {
            Expect(name, actual.Weights[name], values);
        }

        void Expect(string name, float[] a, float[] b)
        {
            Assert.That(
                TestDevice.IsManaged ? a.AsSpan().SequenceEqual(b) : Distance(a, b) < TestDevice.Tolerance, $"{name}, {context}");
        }
    }

    private static double Distance(float[] a, float[] b)
    {
        Assert.That(a, Has.Length.EqualTo(b.Length));
        double scale = Math.Max(1, b.Max(v => Math.Abs((double)v)));
        return a.Zip(b).Max(p => Math.Abs((double)p.First - p.Second)) / scale;
    }

    private Result OnOneDevice(PeftConfig config)
    {
        using IComputeBackend backend = TestDevice.CreateBackend();
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder);
        using LoadedModel model = LoadedModel.Load(checkpoint, Config, backend, null, Config.MaxPositions);
        return Train(model, config);
    }

    private Result OnGroup(
        PeftConfig config, int ranks, Func<BypassTap, Bypass, BypassPlan> plans, CompilerOptions? options = null, bool isDirect = true)
    {
        using var group = new GroupBackend([.. Enumerable.Range(0, ranks).Select(TestDevice.CreateRank)
            .Select(backend => isDirect ? backend : new GroupRig.OwnMemoryOnly(backend))]);
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder);
        using LoadedModel model = LoadedModel.Load(
            checkpoint, Config, group, null, Config.MaxPositions, new ModelShard(Config, ranks, plans));
        return Train(model, config, options);
    }

    // A sample in two windows beside a request, ten times, on one device or a group.
    private static Result Train(LoadedModel model, PeftConfig config, CompilerOptions? options = null)
    {
        IComputeBackend backend = model.Backend;
        var adapter = new PeftAdapter(backend, model.Whole, config, model.Shard);
        foreach ((int site, AdapterTensor tensor) in adapter.Tensors())
        {
            var random = new SeededRandom((ulong)((site * 10) + tensor.Whole.Name.Length));
            float[] values = new float[tensor.Whole.Count];
            for (int i = 0; i < values.Length; i++)
            {
                values[i] = (tensor.Whole.Name == "ia3_l" ? 1 : 0) + (0.2f * (float)random.NextGaussian());
            }

            tensor.Upload(backend, values);
        }

        int[] ids = TinyModel.Ids(19, 3).Select(i => i % Config.VocabularySize).ToArray();
        var plan = new TrainingPlan
        {
            Samples = [TrainingSample.FromTokens(ids, [.. Enumerable.Repeat(true, ids.Length)])],
            Epochs = Steps,
            Optimizer = new SgdOptions { LearningRate = 0.05f, Momentum = 0.9f },
        };
        using var run = new TrainingRun(model, adapter, plan, model.CompileTraining(adapter.Networks, options));
        using var forward = new ForwardPass(model, Rows, sampledMax: 2);
        using var backward = new BackwardPass(model, Rows);
        using DeviceKvCache cache = backend.CreateKvCache(
            Config.LayerCount, 2, model.Config.KeyValueHeads, model.Config.HeadDim);
        var batch = new TokenBatch(Rows);
        float[] logits = new float[2 * Config.VocabularySize];
        var gradients = new Dictionary<string, float[]>();
        for (int step = 0; step < Steps; step++)
        {
            foreach (int tokens in new[] { 7, ids.Length - 7 })
            {
                batch.Clear();
                batch.AddInference(ids.AsSpan(0, 5), 0, cache, [0, 1], adapter, sampled: 2);
                run.AddForwardWindow(batch, tokens);
                TensorSlice result = forward.Run(batch);
                if (step == 0)
                {
                    backend.Download(result, logits);
                    ExpectEqualOnRanks(backend, result);
                }

                run.CompleteForward(tokens);
            }

            while (!run.RunBackward(backward, Math.Min(11, run.Cursor.RowsLeft)))
            {
            }

            if (step == 0)
            {
                foreach ((int site, AdapterTensor tensor) in adapter.Tensors())
                {
                    int index = adapter[site]!.Tensors.Index().Single(t => t.Item == tensor).Index;
                    gradients.Add(NameOf(site, tensor), GradientOf(backend, tensor, run.Gradients[site][index]));
                }
            }

            run.Step();
        }

        return new Result(
            logits, run.LastLoss, gradients,
            adapter.Tensors().ToDictionary(t => NameOf(t.Site, t.Tensor), t => WeightsOf(backend, t.Tensor)));
    }

    private static string NameOf(int site, AdapterTensor tensor) => $"{AdapterSites.NameOf(site)}.{tensor.Whole.Name}";

    private static void ExpectEqualOnRanks(IComputeBackend backend, TensorSlice slice)
    {
        float[][] parts = PartsOf(backend, slice);
        Assert.That(parts, Has.All.EqualTo(parts[0]), "all ranks have the same");
    }

    // Undivided; ranks that hold the same must hold the same bits: what is put together and divided again is as it was.
    private static float[] WeightsOf(IComputeBackend backend, AdapterTensor tensor)
    {
        float[] whole = tensor.Download(backend);
        float[][] before = PartsOf(backend, tensor.Values);
        tensor.Upload(backend, whole);
        Assert.That(PartsOf(backend, tensor.Values), Is.EqualTo(before), $"copies of {tensor.Whole.Name} agree");
        return whole;
    }

    // Gradients that are partial are the sum of what ranks have.
    private static float[] GradientOf(IComputeBackend backend, AdapterTensor tensor, DeviceTensor gradient)
    {
        if (!tensor.GradientIsPartial)
        {
            return tensor.Read(backend, gradient);
        }

        Assert.That(tensor.Spec, Is.EqualTo(tensor.Whole), "every rank has a copy");
        float[][] parts = PartsOf(backend, gradient);
        return [.. parts[0].Select((_, i) => parts.Sum(part => part[i]))];
    }

    private static float[][] PartsOf(IComputeBackend backend, TensorSlice slice)
    {
        return backend is GroupBackend group
            ? [.. group.Settle().Select(rank => Host(rank.Device, rank.Of(slice)))]
            : [Host(backend, slice)];

        static float[] Host(IComputeBackend device, TensorSlice part)
        {
            float[] values = new float[part.Rows * part.Columns];
            device.Download(part, values);
            return values;
        }
    }

    private sealed record Result(
        float[] Logits, double Loss, Dictionary<string, float[]> Gradients, Dictionary<string, float[]> Weights);
}
