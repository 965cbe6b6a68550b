using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Formats;
using FlexLLM.Graph;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Execution;

/// <summary>
/// What was planned before anything existed is what the backend holds, to the byte and in each category, while real training
/// steps run beside inference.
/// </summary>
internal abstract class MemoryPlanContract(ModelArchitecture architecture, DType weights)
{
    private const int KvBlocks = 21;
    private const int Sequences = 3;

    private TinyModel _model = null!;
    private SafetensorsCheckpoint _checkpoint = null!;

    private DType Weights => weights;

    protected abstract IComputeBackend CreateBackend();

    private static readonly (string Name, Func<int, PeftConfig> OfSize)[] Methods =
    [
        ("LoRA of down_proj", size => new LoraConfig { Rank = size, TargetModules = ["down_proj"] }),
        ("LoRA of all", size => new LoraConfig { Rank = Math.Min(size, 14), TargetModules = PeftConfig.AllModules }),
        ("serial Adapter", size => new SerialAdapterConfig { Size = size }),
        ("(IA)^3", _ => new Ia3Config()),
    ];

    private static IEnumerable<TestCaseData> Jobs()
    {
        foreach ((string name, Func<int, PeftConfig> ofSize) in Methods)
        {
            foreach (OptimizerOptions optimizer in (OptimizerOptions[])[
                new SgdOptions(), new SgdOptions { Momentum = 0.9f }, new AdamWOptions()])
            {
                foreach ((int window, int tokens, int size) in ((int, int, int)[])[(64, 64, 4), (7, 33, 5), (90, 17, 17)])
                {
                    yield return new TestCaseData(ofSize(size), optimizer, window, tokens)
                        .SetArgDisplayNames(name, $"{optimizer.Moments} moments", $"{window}", $"{tokens}", $"{size}");
                }
            }
        }
    }

    [OneTimeSetUp]
    public void SetUp()
    {
        _model = new TinyModel(architecture);
        _checkpoint = SafetensorsCheckpoint.Open(_model.Folder);
    }

    [OneTimeTearDown]
    public void TearDown()
    {
        _checkpoint.Dispose();
        _model.Dispose();
    }

    [TestCaseSource(nameof(Jobs))]
    public void Plan_OfARealRun_IsExact(PeftConfig method, OptimizerOptions optimizer, int window, int tokens)
    {
        using var run = new Parts(this, method, optimizer, window, tokens);
        Assert.That(run.Held, Is.EqualTo(run.Planned.Bytes), "before the first step");
        for (int step = 0; step < 2; step++)
        {
            run.Step();
            Assert.That(run.Held, Is.EqualTo(run.Planned.Bytes), $"after step {step + 1}");
        }

        MemoryTable real = run.Real();
        foreach (string use in run.Planned.Uses.Union(real.Uses))
        {
            Assert.That(real.Of(use), Is.EqualTo(run.Planned.Of(use)), use);
        }

        // By operator and count too.
        Assert.That(real.Rows.Where(IsOfJob), Is.EquivalentTo(run.Planned.Rows.Where(IsOfJob)));
    }

    /// <summary>Control: a plan of anything else is another one.</summary>
    [Test]
    public void Plan_OfAnotherJob_DiffersFromTheRun()
    {
        var lora = new LoraConfig { Rank = 4, TargetModules = ["down_proj"] };
        using var run = new Parts(this, lora, new AdamWOptions(), window: 16, tokens: 40);
        run.Step();
        TrainingProgram all = run.ProgramOf(new LoraConfig { Rank = 4, TargetModules = PeftConfig.AllModules });
        long job = run.Plan.OfJob(run.Program, lora, moments: 2, 40).Bytes;
        foreach (MemoryTable other in (MemoryTable[])[
            run.Plan.OfJob(run.Program, lora with { Rank = 5 }, moments: 2, 40),
            run.Plan.OfJob(run.Program, lora, moments: 1, 40),
            run.Plan.OfJob(run.Program, lora, moments: 2, 41),
            run.Plan.OfJob(all, lora, moments: 2, 40)])
        {
            Assert.That(run.Held, Is.Not.EqualTo(run.Planned.Bytes - job + other.Bytes));
        }

        Assert.That(run.Held, Is.EqualTo(run.Planned.Bytes));
    }

    [Test]
    public void Store_ParkedAndUnparked_HoldsItsArenasOrNothingOfThem()
    {
        var lora = new LoraConfig { Rank = 4, TargetModules = PeftConfig.AllModules };
        using var run = new Parts(this, lora, new AdamWOptions(), window: 8, tokens: 20);
        run.ForwardWindow(8);
        Assert.That(run.Training.Park(), Is.EqualTo(8));
        run.Backward.Release(run.Program);
        Assert.That(run.Held, Is.EqualTo(run.Planned.Bytes - run.Planned.Of(MemoryUse.Arenas)));
        run.Training.Unpark();
        run.Backward.Reserve(run.Program);
        Assert.That(run.Held, Is.EqualTo(run.Planned.Bytes));
        run.Step();
        Assert.That(run.Training.TokensDone, Is.EqualTo(20));
    }

    [Test]
    public void Table_AsText_SumsUp()
    {
        var lora = new LoraConfig { Rank = 4, TargetModules = ["down_proj"] };
        using var run = new Parts(this, lora, new SgdOptions(), window: 8, tokens: 20);
        string[] lines = run.Planned.ToString().TrimEnd().Split('\n');
        Assert.That(lines, Has.Some.StartsWith("  weights").And.Some.StartsWith("    gate").And.Some.StartsWith("  logits"));
        Assert.That(lines[^1], Does.StartWith("  together"));
        Assert.That(lines.Select(line => line.Length).Distinct().Count(), Is.EqualTo(1), "columns stand under each other");
        Assert.That(MemoryTable.MiB(3 << 19), Is.EqualTo("1.50 MiB"));
    }

    /// <summary>What a job with AdamW is planned to hold on another device.</summary>
    protected MemoryTable JobOn(IComputeBackend backend, PeftConfig method, int window, int tokens)
    {
        GraphCompiler compiler = LoadedModel.Compile(_model.Config);
        TrainingProgram program = compiler.CompileTraining(
            DecoderBuilder.BuildTraining(_model.Config, PeftAdapter.NetworksOf(method, _model.Config)));
        return PlanOn(backend, compiler, _model.Config, window).OfJob(program, method, moments: 2, tokens);
    }

    private static MemoryPlan PlanOn(IComputeBackend backend, GraphCompiler compiler, ModelConfig config, int rows) =>
        new(config, compiler.Forward, backend, shard: ModelShard.Of(config, backend), limits: new ExecutionLimits
        {
            Rows = rows,
            Sequences = Sequences,
            Windows = 1,
            Positions = config.MaxPositions,
            RankMax = LoraConfig.RankMaxOf(config),
            InnerMax = Math.Max(LoraConfig.RankMaxOf(config), SerialAdapterConfig.SizeMaxOf(config)),
        });

    private static bool IsOfJob(MemoryRow row) =>
        MemoryUse.Arenas.Append(MemoryUse.AdapterWeights).Append(MemoryUse.AdapterGradients).Append(MemoryUse.OptimizerState)
            .Contains(row.Use);

    /// <summary>The parts of an engine and of a job, planned first.</summary>
    private sealed class Parts : IDisposable
    {
        private readonly IComputeBackend _backend;
        private readonly LoadedModel _model;
        private readonly KvPool _pool;
        private readonly ForwardPass _forward;
        private readonly TokenBatch _batch;
        private readonly int _window;
        private readonly int _tokens;

        public Parts(MemoryPlanContract test, PeftConfig method, OptimizerOptions optimizer, int window, int tokens)
        {
            (_backend, _window, _tokens) = (test.CreateBackend(), window, tokens);
            ModelConfig config = test._model.Config;
            ModelShard? shard = ModelShard.Of(config, _backend);
            GraphCompiler compiler = LoadedModel.Compile(config, shard);
            int rows = window + (4 * Sequences);
            Plan = PlanOn(_backend, compiler, config, rows);
            IReadOnlyDictionary<int, BypassNetwork> networks = PeftAdapter.NetworksOf(method, config);
            ParallelGraph graph = DecoderBuilder.BuildTraining(config, networks);
            Program = compiler.CompileTraining(shard?.Parallelize(graph, networks) ?? graph);
            Planned = Plan.OfEngine(_ => test.Weights, KvBlocks) + Plan.OfJob(Program, method, optimizer.Moments, tokens) +
                new MemoryTable([new(
                    MemoryUse.Scratch, "finetuning", 1, Plan.ScratchBytes(trains: true) - Plan.ScratchBytes(trains: false))]);
            Assert.That(_backend.AllocatedBytes, Is.Zero, "a plan allocates nothing");

            _model = LoadedModel.Load(
                test._checkpoint, config, _backend, test.Weights, config.MaxPositions, shard, compiler);
            _backend.ReserveScratch(Plan.Scratch(trains: true));
            _pool = new KvPool(_backend, _model.Config, KvBlocks);
            _forward = new ForwardPass(_model, rows, Sequences);
            _batch = new TokenBatch(rows);
            Backward = new BackwardPass(_model, rows);
            Backward.Reserve(Program);
            bool[] carriesLoss = [.. Enumerable.Range(0, tokens).Select(i => i == tokens - 1 || i % 3 > 0)];
            Training = new TrainingRun(
                _model, PeftAdapter.CreateRandom(_backend, config, method, seed: 1, shard), new TrainingPlan
                {
                    Samples = [TrainingSample.FromTokens(TinyModel.Ids(tokens, 1), carriesLoss)],
                    Epochs = 3,
                    Optimizer = optimizer,
                },
                Program);
        }

        public MemoryPlan Plan { get; }

        public MemoryTable Planned { get; }

        public TrainingProgram Program { get; }

        public TrainingRun Training { get; }

        public BackwardPass Backward { get; }

        public long Held => _backend.AllocatedBytes;

        public TrainingProgram ProgramOf(PeftConfig method) =>
            _model.CompileTraining(PeftAdapter.NetworksOf(method, _model.Whole));

        public MemoryTable Real()
        {
            MemoryTable tensors = new MemoryTable(
            [
                new(MemoryUse.Weights, "all", 1, _model.WeightBytes - _model.RopeTable.Bytes),
                new(MemoryUse.RotaryTable, "all", 1, _model.RopeTable.Bytes),
                new(MemoryUse.KvCache, "all", 1, _pool.Cache.Bytes),
            ]) + _forward.Memory() + Training.Memory() + Backward.Memory(Program);
            return tensors + new MemoryTable([new(MemoryUse.Scratch, "all", 1, Held - tensors.Bytes)]);
        }

        /// <summary>A whole optimizer step in windows, inference in every batch.</summary>
        public void Step()
        {
            while (Training.Cursor.Phase == TrainingPhase.Forward)
            {
                ForwardWindow(Math.Min(_window, _tokens - Training.Cursor.PositionsDone));
            }

            while (!Training.RunBackward(Backward, Math.Min(_window, Training.Cursor.RowsLeft)))
            {
            }

            Training.Step();
            Assert.That(Training.LastLoss, Is.Positive);
        }

        public void ForwardWindow(int tokens)
        {
            _batch.Clear();
            BlockTable[] tables = [.. Enumerable.Range(0, Sequences).Select(_ => new BlockTable())];
            for (int i = 0; i < Sequences; i++)
            {
                // At the very end of the longest sequence, with the adapter in training.
                int start = i == 0 ? 200 : 5 * i;
                Assert.That(tables[i].EnsureCapacity(start + 4, _pool.Blocks), Is.True);
                _batch.AddInference(TinyModel.Ids(4, 2), start, _pool.Cache, tables[i].Blocks, Training.Adapter, sampled: 1);
            }

            Training.AddForwardWindow(_batch, tokens);
            _forward.Run(_batch);
            _backend.Synchronize();
            Training.CompleteForward(tokens);
            foreach (BlockTable table in tables)
            {
                table.Release(_pool.Blocks);
            }
        }

        public void Dispose()
        {
            Training.Dispose();
            Backward.Dispose();
            _forward.Dispose();
            _pool.Dispose();
            _model.Dispose();
            _backend.Dispose();
            Assert.That(Held, Is.Zero);
        }
    }
}

/// <summary>The same on the device of the tests.</summary>
[DeviceFixture(ModelArchitecture.Llama, DType.F32)]
[DeviceFixture(ModelArchitecture.Llama, DType.BF16)]
[DeviceFixture(ModelArchitecture.Qwen2, DType.F32)]
[DeviceFixture(ModelArchitecture.Qwen2, DType.BF16)]
[DeviceFixture(ModelArchitecture.Qwen3, DType.F32)]
[DeviceFixture(ModelArchitecture.Qwen3, DType.BF16)]
internal sealed class MemoryPlanTests(ModelArchitecture architecture, DType weights) : MemoryPlanContract(architecture, weights)
{
    protected override IComputeBackend CreateBackend() => TestDevice.CreateBackend(2);
}

/// <summary>The same on a group of devices: their bytes together.</summary>
[DeviceFixture(ModelArchitecture.Llama, DType.F32)]
[DeviceFixture(ModelArchitecture.Qwen3, DType.BF16)]
internal sealed class GroupMemoryPlanTests(ModelArchitecture architecture, DType weights) : MemoryPlanContract(architecture, weights)
{
    protected override IComputeBackend CreateBackend() => new GroupBackend([TestDevice.CreateRank(0), TestDevice.CreateRank(1)]);
}
