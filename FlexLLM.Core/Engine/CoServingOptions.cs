using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Backends.Group;
using Microsoft.Extensions.Logging;
using Microsoft.Extensions.Logging.Abstractions;

namespace FlexLLM;

/// <summary>Latency that a request may expect; finetuning gets only the time that these targets leave.</summary>
public sealed record ServiceLevelObjective
{
    // Longer targets mean "none"; the scheduler's sums of times stay far from overflow.
    private static readonly TimeSpan TargetMax = TimeSpan.FromHours(1);

    /// <summary>Longest mean time between two tokens of one answer (TPOT).</summary>
    /// <value>100 ms.</value>
    public TimeSpan TimePerOutputToken { get; init; } = TimeSpan.FromMilliseconds(100);

    /// <summary>Longest time from submission to the first token (TTFT), waiting included.</summary>
    /// <value>2 s.</value>
    public TimeSpan TimeToFirstToken { get; init; } = TimeSpan.FromSeconds(2);

    /// <summary>
    /// Longest time between any two tokens, in about 99 % of the steps (p99); null for none. No step in which the answer grows is
    /// planned longer, whatever time it has saved: prompts of others and finetuning wait instead. May be above or below
    /// <see cref="TimePerOutputToken"/>, which stays a mean.
    /// </summary>
    public TimeSpan? InterTokenLatency { get; init; }

    /// <summary>The same targets, none longer than an hour.</summary>
    internal ServiceLevelObjective Bounded() => new()
    {
        TimePerOutputToken = TimePerOutputToken < TargetMax ? TimePerOutputToken : TargetMax,
        TimeToFirstToken = TimeToFirstToken < TargetMax ? TimeToFirstToken : TargetMax,
        InterTokenLatency = InterTokenLatency < TargetMax ? InterTokenLatency : null,
    };

    /// <summary>What a machine cannot keep of it even for one request alone; null where it can.</summary>
    /// <param name="tokenMin">Least time of a token.</param>
    /// <param name="promptTokens">Tokens of the prompt that are to be computed.</param>
    /// <param name="promptMin">Least time of that.</param>
    internal string? FaultAgainst(TimeSpan tokenMin, int promptTokens, TimeSpan promptMin)
    {
        bool isStrict = InterTokenLatency < TimePerOutputToken;
        return
            Fault(isStrict ? nameof(InterTokenLatency) : nameof(TimePerOutputToken),
                isStrict ? InterTokenLatency!.Value : TimePerOutputToken, tokenMin, "a token") ??
            Fault(nameof(TimeToFirstToken), TimeToFirstToken, promptMin,
                FormattableString.Invariant($"the first token after {promptTokens} of the prompt"));
    }

    private static string? Fault(string name, TimeSpan target, TimeSpan least, string work) => target >= least
        ? null
        : FormattableString.Invariant($"{name} is {target.TotalMilliseconds:G4} ms, but {work} takes at least ") +
          FormattableString.Invariant($"{least.TotalMilliseconds:G4} ms here even alone (measured at load).");

    internal void Validate()
    {
        ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(TimePerOutputToken, TimeSpan.Zero, nameof(TimePerOutputToken));
        ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(TimeToFirstToken, TimeSpan.Zero, nameof(TimeToFirstToken));
        ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(
            InterTokenLatency ?? TimeSpan.MaxValue, TimeSpan.Zero, nameof(InterTokenLatency));
    }
}

/// <summary>What happens to latency targets that the machine cannot keep even for one request alone.</summary>
public enum UnattainableSlo
{
    /// <summary>A warning in the log; requests are served as well as possible, finetuning gets nothing beside them.</summary>
    Warn,

    /// <summary>The engine does not load, or the request is refused.</summary>
    Refuse,
}

/// <summary>Where an engine computes.</summary>
public abstract class ComputeDevice
{
    /// <summary>The managed SIMD backend: no native dependency, bitwise deterministic.</summary>
    /// <param name="threads">Threads that compute, or null for one a processor.</param>
    public static ComputeDevice Cpu(int? threads = null)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(threads ?? 1, 1, nameof(threads));
        return new CpuDevice(threads ?? Environment.ProcessorCount);
    }

    /// <summary>
    /// Several devices as one (tensor parallelism): each has its share of a layer's heads and MLP, of the keys and values, and of
    /// adapters as the cheapest plan divides them; embedding, norms and head are on every one. Their number must divide the model's
    /// heads, key/value heads and inner width. <see cref="CoServingOptions.DeviceBytesMax"/> and statistics count the bytes of all.
    /// </summary>
    /// <param name="devices">One or more: different GPUs, or parts of the processors (<see cref="Cpu"/> with some of the threads).</param>
    /// <exception cref="ArgumentException">There is none, one is a group itself, or a GPU is named twice.</exception>
    public static ComputeDevice Group(params ComputeDevice[] devices)
    {
        ArgumentNullException.ThrowIfNull(devices);
        ComputeDevice[] ranks = [.. devices];
        if (ranks.Length == 0 || ranks.Any(rank => rank is null or GroupDevice))
        {
            throw new ArgumentException("A group has one device or more, and none of them is a group itself.", nameof(devices));
        }

        string? twice = ranks.Select(rank => rank.Memory).OfType<string>().GroupBy(name => name).FirstOrDefault(g => g.Count() > 1)?.Key;
        return twice is not null
            ? throw new ArgumentException($"A group needs different devices; '{twice}' is named twice.", nameof(devices))
            : ranks.Length == 1 ? ranks[0] : new GroupDevice(ranks);
    }

    /// <summary>Name of the memory that this device alone has; null for that of the process.</summary>
    internal virtual string? Memory => null;

    internal abstract IComputeBackend CreateBackend();

    private sealed class CpuDevice(int threads) : ComputeDevice
    {
        internal override IComputeBackend CreateBackend() => new CpuBackend(threads);
    }

    private sealed class GroupDevice(ComputeDevice[] ranks) : ComputeDevice
    {
        internal override IComputeBackend CreateBackend()
        {
            var opened = new List<IComputeBackend>();
            try
            {
                foreach (ComputeDevice rank in ranks)
                {
                    opened.Add(rank.CreateBackend());
                }

                return new GroupBackend(opened);
            }
            catch
            {
                opened.ForEach(backend => backend.Dispose());
                throw;
            }
        }
    }
}

/// <summary>Limits and targets of a <see cref="CoServingEngine"/>; checked when the engine is loaded.</summary>
public sealed record CoServingOptions
{
    /// <summary>Latency targets of interactive requests that name none of their own.</summary>
    public ServiceLevelObjective Slo { get; init; } = new();

    /// <summary>Latency targets of batch requests that name none of their own.</summary>
    /// <value>TPOT 1 s, TTFT 60 s.</value>
    public ServiceLevelObjective BatchSlo { get; init; } = new()
    {
        TimePerOutputToken = TimeSpan.FromSeconds(1),
        TimeToFirstToken = TimeSpan.FromSeconds(60),
    };

    /// <summary>
    /// What to do about targets below what was measured at load: TPOT and inter-token against one token, TTFT against a request's prompt,
    /// less what the prefix cache has of it.
    /// </summary>
    /// <value><see cref="FlexLLM.UnattainableSlo.Warn"/>.</value>
    public UnattainableSlo UnattainableSlo { get; init; }

    /// <summary>
    /// Shares of tenants relative to each other, by <see cref="GenerationRequest.Tenant"/>; the empty name is the anonymous tenant.
    /// More than 0 and finite. Who is not named has 1.
    /// </summary>
    public IReadOnlyDictionary<string, double> TenantWeights { get; init; } = new Dictionary<string, double>();

    /// <summary>How requests and finetuning jobs share the engine; anything but the default is there to compare with.</summary>
    /// <value><see cref="SharingPolicy.CoServing"/>.</value>
    public SharingPolicy Sharing { get; init; } = SharingPolicy.CoServing;

    /// <summary>Where to compute.</summary>
    /// <value>The managed CPU backend on all processors.</value>
    public ComputeDevice Device { get; init; } = ComputeDevice.Cpu();

    /// <summary>
    /// Type that matrices are held in: F32 or BF16, or null to keep what the checkpoint has (F16 is widened to F32).
    /// </summary>
    public DType? WeightType { get; init; }

    /// <summary>
    /// Longest sequence, prompt and answer, in tokens; at most the checkpoint's own limit, which null takes up to 4,096.
    /// </summary>
    public int? ContextTokensMax { get; init; }

    /// <summary>
    /// Size of the paged KV cache that all requests share, in tokens; rounded up to blocks of 16. Null: 4 full contexts. Where
    /// <see cref="DeviceBytesMax"/> leaves less, the cache is as large as fits, at least a full context.
    /// </summary>
    public int? KvCacheTokens { get; init; }

    /// <summary>
    /// Part of the KV cache that finetuning and adapters never take, in tokens; at least a full context, which is also what null
    /// stands for, or all of a smaller cache.
    /// </summary>
    public int? KvCacheTokensMin { get; init; }

    /// <summary>
    /// Whether requests that begin with the same tokens, for the same version of an adapter, share the keys and values of whole blocks
    /// of 16 of them, also after the first has ended: what nobody holds stays in the KV cache until others need the room. The answers
    /// are the same. How soon a first token comes can tell one caller that another sent the same beginning: turn it off where that
    /// must not be.
    /// </summary>
    /// <value>True.</value>
    public bool PrefixCaching { get; init; } = true;

    /// <summary>
    /// Most bytes on the device, for weights, workspace, KV cache, adapters and jobs together. A job or an adapter that needs more than
    /// is free takes it from the KV cache, which shrinks down to <see cref="KvCacheTokensMin"/> (or to what the longest request in the
    /// engine was promised) and grows back when it is free again; requests whose blocks are taken are computed again, with the
    /// same answers. What still does not fit is refused before anything is allocated, with a table of what it needs. Null: nine
    /// tenths of what is free on the GPU before the engine loads, or of the memory that this process may use where the device has none
    /// of its own.
    /// </summary>
    public long? DeviceBytesMax { get; init; }

    /// <summary>Most rows, inference and finetuning together, in one step.</summary>
    /// <value>256.</value>
    public int TokensPerStepMax { get; init; } = 256;

    /// <summary>Most requests that run at a time.</summary>
    /// <value>32.</value>
    public int SequencesMax { get; init; } = 32;

    /// <summary>Most requests inside the engine, running and waiting; further callers wait for a place.</summary>
    /// <value>1,024.</value>
    public int RequestsMax { get; init; } = 1024;

    /// <summary>Most finetuning jobs that are not finished.</summary>
    /// <value>8.</value>
    public int JobsMax { get; init; } = 8;

    /// <summary>Most adapters loaded at a time.</summary>
    /// <value>64.</value>
    public int AdaptersMax { get; init; } = 64;

    /// <summary>Messages that may wait for the loop; further callers wait.</summary>
    /// <value>256.</value>
    public int InboxCapacity { get; init; } = 256;

    /// <summary>
    /// What an arrival may have to wait for finetuning while no other request is in the engine. More trains more tokens, in longer steps.
    /// Null: a tenth of <see cref="Slo"/>'s time to first token, at least 100 ms.
    /// </summary>
    public TimeSpan? IdleStepMax { get; init; }

    /// <summary>
    /// Longest measurement of this machine's speed while the engine loads; a model that computes fast needs far less. Zero measures
    /// nothing: the first steps are then planned from a guess, with little finetuning beside requests. Null: the time of 200 steps of
    /// one token, 2 to 10 seconds.
    /// </summary>
    public TimeSpan? ProfilingTimeMax { get; init; }

    /// <summary>
    /// Folder where measured speeds are kept, one file for each shape of model, kind of machine and step limits. A file that fits takes
    /// the place of the measurement; what the engine has learnt since is written back when it is disposed. Null keeps nothing.
    /// </summary>
    public string? LatencyProfileFolder { get; init; }

    /// <summary>Seed from which requests without a seed of their own draw theirs.</summary>
    public ulong Seed { get; init; }

    /// <summary>The clock of all latencies; tests and simulations move it by hand.</summary>
    public TimeProvider Clock { get; init; } = TimeProvider.System;

    /// <summary>Receives events of jobs, adapters and faults.</summary>
    public ILogger Logger { get; init; } = NullLogger.Instance;

    internal long DeviceBytesLimit(IComputeBackend backend) =>
        DeviceBytesMax ?? (long)((backend.MemoryBytes ?? GC.GetGCMemoryInfo().TotalAvailableMemoryBytes) * 0.9);

    internal TimeSpan IdleStepLimit =>
        IdleStepMax ?? TimeSpan.FromMilliseconds(Math.Max(100.0, Slo.Bounded().TimeToFirstToken.TotalMilliseconds / 10.0));

    internal ServiceLevelObjective SloOf(RequestClass requestClass) => requestClass == RequestClass.Batch ? BatchSlo : Slo;

    internal void Validate()
    {
        ArgumentNullException.ThrowIfNull(Slo);
        ArgumentNullException.ThrowIfNull(BatchSlo);
        ArgumentNullException.ThrowIfNull(TenantWeights);
        BatchSlo.Validate();
        foreach ((string tenant, double weight) in TenantWeights)
        {
            if (!(weight > 0.0 && double.IsFinite(weight)))
            {
                throw new ArgumentOutOfRangeException(
                    nameof(TenantWeights), weight, $"The weight of tenant '{tenant}' must be more than 0 and finite.");
            }
        }

        if (!Enum.IsDefined(UnattainableSlo))
        {
            throw new ArgumentOutOfRangeException(nameof(UnattainableSlo), UnattainableSlo, "Warn or Refuse.");
        }

        ArgumentNullException.ThrowIfNull(Sharing);
        ArgumentNullException.ThrowIfNull(Device);
        ArgumentNullException.ThrowIfNull(Clock);
        ArgumentNullException.ThrowIfNull(Logger);
        Slo.Validate();
        if (WeightType is DType.F16)
        {
            throw new ArgumentOutOfRangeException(nameof(WeightType), WeightType, "Weights are held in F32 or BF16.");
        }

        ArgumentOutOfRangeException.ThrowIfLessThan(ContextTokensMax ?? 2, 2, nameof(ContextTokensMax));
        ArgumentOutOfRangeException.ThrowIfLessThan(KvCacheTokens ?? 16, 16, nameof(KvCacheTokens));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(KvCacheTokens ?? 16, 1 << 30, nameof(KvCacheTokens));
        ArgumentOutOfRangeException.ThrowIfLessThan(KvCacheTokensMin ?? 16, 16, nameof(KvCacheTokensMin));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(KvCacheTokensMin ?? 16, KvCacheTokens ?? 1 << 30, nameof(KvCacheTokensMin));
        ArgumentOutOfRangeException.ThrowIfLessThan(DeviceBytesMax ?? 1, 1, nameof(DeviceBytesMax));
        ArgumentOutOfRangeException.ThrowIfLessThan(TokensPerStepMax, 1, nameof(TokensPerStepMax));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(TokensPerStepMax, 8192, nameof(TokensPerStepMax));
        ArgumentOutOfRangeException.ThrowIfLessThan(SequencesMax, 1, nameof(SequencesMax));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(SequencesMax, TokensPerStepMax, nameof(SequencesMax));
        ArgumentOutOfRangeException.ThrowIfLessThan(RequestsMax, 1, nameof(RequestsMax));
        ArgumentOutOfRangeException.ThrowIfLessThan(JobsMax, 1, nameof(JobsMax));
        ArgumentOutOfRangeException.ThrowIfLessThan(AdaptersMax, 1, nameof(AdaptersMax));
        ArgumentOutOfRangeException.ThrowIfLessThan(InboxCapacity, 1, nameof(InboxCapacity));
        ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(IdleStepMax ?? TimeSpan.MaxValue, TimeSpan.Zero, nameof(IdleStepMax));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(IdleStepMax ?? TimeSpan.Zero, TimeSpan.FromHours(1), nameof(IdleStepMax));
        ArgumentOutOfRangeException.ThrowIfLessThan(ProfilingTimeMax ?? TimeSpan.Zero, TimeSpan.Zero, nameof(ProfilingTimeMax));
        ArgumentOutOfRangeException.ThrowIfGreaterThan(ProfilingTimeMax ?? TimeSpan.Zero, TimeSpan.FromHours(1), nameof(ProfilingTimeMax));
        if (LatencyProfileFolder is not null)
        {
            ArgumentException.ThrowIfNullOrWhiteSpace(LatencyProfileFolder, nameof(LatencyProfileFolder));
        }
    }
}
