using BenchmarkDotNet.Attributes;
using FlexLLM.Scheduling;

namespace FlexLLM.Benchmarks;

/// <summary>One plan with 64 waiting requests of 8 tenants and 4 jobs, by the number of requests that decode.</summary>
[MemoryDiagnoser]
public class SchedulerBenchmarks
{
    private readonly StepLimits _limits = new() { TokensPerStepMax = 512, SequencesMax = 256 };
    private readonly PlannerScratch _scratch = new();
    private readonly LatencyModel _latency = LatencyModel.Default with { Correction = 0.1 };
    private EngineSnapshot _now = null!;

    /// <summary>Requests that decode.</summary>
    [Params(16, 64, 256)]
    public int Running { get; set; }

    /// <summary>Draws up the snapshot.</summary>
    [GlobalSetup]
    public void Setup()
    {
        const int Blocks = 8_000;
        SequenceSnapshot[] sequences = [.. Enumerable.Range(0, Running + 64).Select(i => Sequence(i, i < Running))];
        _now = new EngineSnapshot
        {
            Now = TimeSpan.FromSeconds(1),
            Sequences = [.. sequences],
            Jobs = [.. Enumerable.Range(0, 4).Select(Job)],
            Tenants = [.. Enumerable.Range(0, 8).Select(i => new TenantSnapshot { Served = i, Weight = 1.0 })],
            FreeBlocks = Blocks - sequences.Sum(s => s.BlocksHeld),
            TotalBlocks = Blocks,
            TokensPerBlock = 16,
        };
    }

    /// <summary>As the engine does it, step after step.</summary>
    [Benchmark]
    public object Plan() => HybridTokenScheduler.Plan(_now, _limits, _latency, _scratch);

    private static SequenceSnapshot Sequence(int i, bool runs)
    {
        int context = 100 + i;
        return new SequenceSnapshot
        {
            Id = new SequenceId(i),
            Phase = runs ? SequencePhase.Running : SequencePhase.Waiting,
            TokensTotal = context + 1,
            TokensComputed = runs ? context : 0,
            TokensMax = context + 200,
            BlocksHeld = runs ? (context + 15) / 16 : 0,
            ServiceDue = runs ? 0 : context,
            Tenant = i % 8,
            ArrivalTime = TimeSpan.FromMilliseconds(i),
            FirstTokenTime = runs ? TimeSpan.FromSeconds(1) : null,
            TokensGenerated = runs ? 1 : 0,
            TpotTarget = TimeSpan.FromMilliseconds(80),
            TtftTarget = TimeSpan.FromSeconds(60),
        };
    }

    private static JobSnapshot Job(int i) => new()
    {
        Id = new JobId(i),
        Weight = 1.0,
        Phase = i % 2 == 0 ? JobPhase.Forward : JobPhase.Backward,
        SampleTokens = 900,
        Layer = 15,
        RowsLeft = 900,
    };
}
