using BenchmarkDotNet.Attributes;
using FlexLLM.Backends.Null;
using FlexLLM.Benchmarks.Simulation;
using FlexLLM.Engine;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Scheduling;

namespace FlexLLM.Benchmarks;

/// <summary>
/// What an engine spends on a step besides computing, by the number of requests that decode: its snapshot, and the snapshot with the
/// plan. The engine is a real one, of which a few steps were run without a machine.
/// </summary>
[MemoryDiagnoser]
public class SnapshotBenchmarks
{
    private const int PromptTokens = 64;
    private const int AnswerTokens = 512;

    private readonly PlannerScratch _scratch = new();
    private Func<EngineSnapshot> _snapshot = null!;
    private StepLimits _limits = null!;
    private Action _free = null!;

    /// <summary>Requests that decode.</summary>
    [Params(16, 64, 256)]
    public int Running { get; set; }

    /// <summary>Brings the engine to where all decode.</summary>
    [GlobalSetup]
    public void Setup()
    {
        var clock = new ManualClock();
        var backend = new NullBackend(new NullMachine { FlopsPerSecond = 1e15, BytesPerSecond = 1e15 }, clock, seed: 1);
        ModelConfig config = ServingSimulation.StandIn(layers: 1);
        LoadedModel model = LoadedModel.CreateEmpty(config, backend, DType.BF16, config.MaxPositions);
        var options = new CoServingOptions { Clock = clock, TokensPerStepMax = 512, SequencesMax = Running, DeviceBytesMax = 1L << 40 };
        var inbox = new EngineInbox(options.InboxCapacity);
        var loop = new EngineLoop(
            model, tokenizer: null, options, inbox, eosTokens: [], BlockTable.BlocksFor(Running * 2 * (PromptTokens + AnswerTokens)));
        var callers = new LoopCaller(inbox, clock);
        for (int i = 0; i < Running; i++)
        {
            int first = i % config.VocabularySize;
            callers.Submit([.. Enumerable.Repeat(first, PromptTokens)], AnswerTokens, waited: TimeSpan.Zero);
            loop.RunStep();
        }

        (_snapshot, _limits) = (loop.TakeSnapshot, loop.Limits);
        _free = () =>
        {
            loop.Stop(new ObjectDisposedException(nameof(SnapshotBenchmarks)), jobs: null);
            loop.Dispose();
            model.Dispose();
            backend.Dispose();
        };
    }

    /// <summary>Frees the engine.</summary>
    [GlobalCleanup]
    public void Cleanup() => _free();

    /// <summary>All that a plan depends on.</summary>
    [Benchmark]
    public object Snapshot() => _snapshot();

    /// <summary>As the engine does it, step after step.</summary>
    [Benchmark]
    public object SnapshotAndPlan() => HybridTokenScheduler.Plan(_snapshot(), _limits, LatencyModel.Default, _scratch);
}
