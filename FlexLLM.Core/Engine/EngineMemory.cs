using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Graph;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Scheduling;

namespace FlexLLM.Engine;

/// <summary>How the options of an engine become limits and a size of its KV cache.</summary>
internal static class EngineMemory
{
    private const int ContextsCached = 4;

    public static MemoryPlan PlanOf(
        ModelConfig config, ForwardProgram program, IComputeBackend backend, CoServingOptions options, int positions,
        ModelShard? shard = null) =>
        new(config, program, backend, shard: shard, limits: new ExecutionLimits
        {
            Rows = options.TokensPerStepMax,
            Sequences = options.SequencesMax,
            Windows = options.JobsMax,
            Positions = positions,
            RankMax = LoraConfig.RankMaxOf(config),
            InnerMax = Math.Max(LoraConfig.RankMaxOf(config), SerialAdapterConfig.SizeMaxOf(config)),
        });

    /// <summary>Blocks of the KV cache where memory is no concern.</summary>
    public static int KvBlocksMax(CoServingOptions options, int positions) => BlockTable.BlocksFor(
        options.KvCacheTokens ?? (int)Math.Min((long)ContextsCached * positions, int.MaxValue / 2));

    /// <summary>
    /// Blocks that the KV cache has at least, whoever needs memory: a full context, so that no answer becomes shorter, and what the
    /// options hold back.
    /// </summary>
    public static int KvBlocksMin(CoServingOptions options, int positions) => Math.Min(
        KvBlocksMax(options, positions),
        Math.Max(BlockTable.BlocksFor(positions), BlockTable.BlocksFor(options.KvCacheTokensMin ?? 0)));

    /// <summary>
    /// Blocks that the KV cache starts with: all, or what the budget leaves. Nothing is allocated before this has passed.
    /// </summary>
    /// <exception cref="RequestRejectedException">Not even the least would fit.</exception>
    public static int KvBlocksWithin(
        long bytesMax, Func<int, MemoryPlan> planAt, Func<WeightShape, DType> typeOf, CoServingOptions options, int positions)
    {
        MemoryPlan plan = planAt(positions);
        int least = KvBlocksMin(options, positions);
        long left = bytesMax - plan.OfEngine(typeOf, least).Bytes;
        if (left >= 0)
        {
            return (int)Math.Min(KvBlocksMax(options, positions), least + (left / plan.KvBytes(1)));
        }

        int fitting = Bisection.Largest(
            positions, n => planAt(n).OfEngine(typeOf, KvBlocksMin(options, n)).Bytes <= bytesMax);
        string advice = fitting > 1
            ? $"A context of at most {fitting} tokens (ContextTokensMax) would fit."
            : "WeightType BF16, or a smaller TokensPerStepMax or SequencesMax, needs less.";
        throw new RequestRejectedException(
            $"The engine does not fit into CoServingOptions.DeviceBytesMax, {MemoryTable.MiB(bytesMax)}. With the smallest KV cache, " +
            $"{least * DeviceKvCache.TokensPerBlock} tokens, it needs\n{plan.OfEngine(typeOf, least)}{advice}");
    }
}
