using FlexLLM.Adapters;
using FlexLLM.Backends.Null;
using FlexLLM.Benchmarks.Simulation;
using FlexLLM.Execution;
using FlexLLM.Graph;
using FlexLLM.KvCache;
using FlexLLM.Models;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>The simulated machines against the authors' figures, and their closed form against the Null backend.</summary>
[TestFixture]
[Parallelizable]
internal sealed class CalibrationTests
{
    private static IEnumerable<SimulatedModel> Models => SimulatedModel.Paper;

    [TestCaseSource(nameof(Models))]
    public void ClosedForm_AuthorsPolicyAndServer_WithinTheBound(SimulatedModel model)
    {
        CalibrationRow[] rows = [.. Calibration.Rows(model), .. Calibration.ServerRows(model)];

        Assert.That(rows.Where(r => Math.Abs(r.Ratio - 1) > Calibration.ErrorMax), Is.Empty);
    }

    [Test]
    public void ClosedForm_LatencyFunctionOf70B_WithinTheBound() =>
        Assert.That(Calibration.Error(Calibration.ProfileRows(SimulatedModel.Profiled)), Is.LessThanOrEqualTo(Calibration.ErrorMax));

    /// <summary>The control: a machine without losses does not give the figures.</summary>
    [Test]
    public void Control_PeakOfTheDataSheet_IsOutOfTheBound()
    {
        SimulatedModel model = SimulatedModel.Of("8b");

        Assert.That(Calibration.Error(Calibration.Rows(model with { Fit = new MachineFit(1, 1, 0) })), Is.GreaterThan(0.2));
    }

    // Chance moves a short run, and its first answers take a while: its bound is wider than that of ten minutes.
    [TestCaseSource(nameof(Models))]
    public void Simulated_AuthorsPolicyAtTwoAndFourRequests_WithinTheBound(SimulatedModel model)
    {
        IReadOnlyList<CalibrationRow> rows = CalibrationReport.SimulatedRows(model, seconds: 300, seed: 1, 2, 4);

        foreach (CalibrationRow row in rows)
        {
            TestContext.Out.WriteLine($"{row.Figure}: {row.Theirs} {row.Ours:F1} {row.Ratio:F3}");
        }

        Assert.That(Calibration.Error(rows), Is.LessThan(0.15));
    }

    [TestCaseSource(nameof(Models))]
    public void ClosedForm_BatchAndItem_AreWhatTheNullBackendCharges(SimulatedModel model)
    {
        const int Decodes = 24;
        const int Context = 500;
        const int WindowRows = 200;
        const int WindowStart = 1000;
        ModelConfig config = model.Config with { LayerCount = 2, MaxPositions = 2048, VocabularySize = 32_000 };
        NullMachine machine = model.Machine;
        var clock = new ManualClock();
        using var backend = new NullBackend(machine, clock, seed: 1);
        LoadedModel loaded = LoadedModel.CreateEmpty(config, backend, DType.BF16, positionsMax: 2048);
        using var pool = new KvPool(backend, config, blocks: 2048);
        using var pass = new ForwardPass(loaded, rowsMax: 512, sampledMax: 256);
        var costs = new StepCosts(config, machine);
        int[] ids = new int[512];

        var batch = new TokenBatch(512);
        for (int i = 0; i < Decodes; i++)
        {
            var table = new BlockTable();
            Assert.That(table.EnsureCapacity(Context + 1, pool.Blocks), Is.True);
            batch.AddInference(ids.AsSpan(0, 1), Context, pool.Cache, table.Blocks, adapter: null, sampled: 1);
        }

        long begun = clock.GetTimestamp();
        pass.Run(batch);
        double seconds = clock.GetElapsedTime(begun).TotalSeconds;

        double positions = Decodes * (Context + 1);
        double closed = costs.Batch(new BatchWork(Decodes, Decodes, 0, positions, positions));
        TestContext.Out.WriteLine($"batch: Null {seconds * 1e3:F3} ms, closed form {closed * 1e3:F3} ms");
        Assert.That(closed, Is.EqualTo(seconds).Within(0.01 * seconds));

        TrainingProgram program = loaded.CompileTraining(
            PeftAdapter.NetworksOf(new LoraConfig { Rank = 16, TargetModules = ["down_proj"] }, config), new CompilerOptions());
        using var backward = new BackwardPass(loaded, rowsMax: 512);
        using PeftAdapter adapter = PeftAdapter.CreateRandom(
            backend, config, new LoraConfig { Rank = 16, TargetModules = ["down_proj"] }, seed: 1);
        using var gradients = new AdapterGradients(backend, adapter);
        using var store = new ActivationStore(loaded, program, tokensMax: 1500);
        backward.Reserve(program);
        begun = clock.GetTimestamp();
        backward.Run(store, layer: 1, WindowStart, WindowRows, 1500, adapter, gradients);
        seconds = clock.GetElapsedTime(begun).TotalSeconds;

        closed = costs.Item(WindowStart, WindowRows);
        TestContext.Out.WriteLine($"item: Null {seconds * 1e3:F3} ms, closed form {closed * 1e3:F3} ms");
        Assert.That(closed, Is.EqualTo(seconds).Within(0.05 * seconds));
        loaded.Dispose();
    }
}
