using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>The largest batch that the passes will get.</summary>
internal sealed record ExecutionLimits
{
    /// <summary>Most rows of a batch, and of a backward window.</summary>
    public required int Rows { get; init; }

    /// <summary>Most inference sequences of a batch, each with one sampled row.</summary>
    public required int Sequences { get; init; }

    /// <summary>Most finetuning windows of a batch.</summary>
    public required int Windows { get; init; }

    /// <summary>Longest sequence or sample, in tokens.</summary>
    public required int Positions { get; init; }

    /// <summary>Largest rank of LoRA.</summary>
    public required int RankMax { get; init; }

    /// <summary>Largest inner side of any bypass matrix.</summary>
    public required int InnerMax { get; init; }
}

/// <summary>
/// Tells what a model, a job, an adapter will hold on the device, to the byte, from the config, the compiled programs, limits
/// and the sizes that the backend states. It allocates nothing, and it knows no model: slots and saved values are those of
/// the programs.
/// </summary>
internal sealed class MemoryPlan
{
    private readonly ModelConfig _whole;
    private readonly ModelShard? _shard;
    private readonly ModelConfig _config;
    private readonly ForwardProgram _program;
    private readonly IComputeBackend _backend;
    private readonly IReadOnlyList<WeightShape> _weights;

    /// <param name="whole">The model.</param>
    /// <param name="program">Its forward program; on a group of devices a rank's.</param>
    /// <param name="backend">The device; told bytes of a group are those of all ranks.</param>
    /// <param name="limits">The largest step.</param>
    /// <param name="shard">How the model is divided among a group's ranks; null on one device.</param>
    public MemoryPlan(
        ModelConfig whole, ForwardProgram program, IComputeBackend backend, ExecutionLimits limits, ModelShard? shard = null)
    {
        (_whole, _shard) = (whole, shard);
        ModelConfig config = _config = shard?.Local ?? whole;
        _program = program;
        _backend = backend;
        _weights = DecoderWeights.Of(config);
        Limits = limits;
    }

    public ExecutionLimits Limits { get; }

    /// <summary>What an engine holds before it has a job or an adapter.</summary>
    /// <param name="typeOf">Stored type of each matrix.</param>
    /// <param name="kvBlocks">Blocks of the KV cache.</param>
    public MemoryTable OfEngine(Func<WeightShape, DType> typeOf, int kvBlocks)
    {
        WeightShape[] matrices = [.. _weights.Where(w => !w.IsVector)];
        WeightShape[] vectors = [.. _weights.Where(w => w.IsVector)];
        long matrixBytes = matrices.Sum(m => _backend.WeightBytes(m.Rows, m.Columns, typeOf(m)));
        return new MemoryTable(
        [
            new(MemoryUse.Weights, "matrices", matrices.Length, matrixBytes),
            new(MemoryUse.Weights, "vectors", vectors.Length, vectors.Sum(v => _backend.TensorBytes(1, v.Columns))),
            new(MemoryUse.RotaryTable, "cosines and sines", 1, _backend.TensorBytes(Limits.Positions, _config.HeadDim)),
            new(MemoryUse.KvCache, "blocks", kvBlocks, KvBytes(kvBlocks)),
            .. OfForwardPass().Rows,
            new(MemoryUse.Scratch, "inference", 1, ScratchBytes(trains: false)),
        ]);
    }

    /// <summary>What the forward pass holds for the batch in work.</summary>
    public MemoryTable OfForwardPass() => new(
    [
        new(MemoryUse.ForwardWorkspace, "slots", _program.Arena.Slots.Count, ArenaBytes(_program.Arena.Columns)),
        new(MemoryUse.ForwardWorkspace, "networks of adapters", 1, ArenaBytes(BypassRunner.ArenaColumns(_config))),
        new(MemoryUse.Logits, "rows", Limits.Sequences, _backend.TensorBytes(Limits.Sequences, _config.VocabularySize)),
    ]);

    /// <summary>What a job holds, its adapter included.</summary>
    /// <param name="program">Its backward program.</param>
    /// <param name="method">Its adapter.</param>
    /// <param name="moments">Tensors that the optimizer keeps beside each weight: 0, 1 or 2.</param>
    /// <param name="tokens">Longest sample.</param>
    public MemoryTable OfJob(TrainingProgram program, PeftConfig method, int moments, int tokens)
    {
        BypassWeight[] tensors = [.. PeftAdapter.WeightsOf(method, _whole, _shard)];
        long gradients = tensors.Sum(t => _backend.TensorBytes(Math.Max(1, t.Inner), t.Wide));
        return new MemoryTable(
        [
            .. OfSample(program, tokens).Rows,
            new(MemoryUse.BackwardWorkspace, "slots", program.Arena.Slots.Count, ArenaBytes(program.Arena.Columns)),
            .. OfAdapter(method).Rows,
            new(MemoryUse.AdapterGradients, "tensors", tensors.Length, gradients),
            new(MemoryUse.OptimizerState, "tensors", moments * tensors.Length, moments * gradients),
        ]);
    }

    /// <summary>What a job holds for one sample, from its first forward window to its last backward item.</summary>
    public MemoryTable OfSample(TrainingProgram program, int tokens)
    {
        int kvColumns = _config.KeyValueHeads * _config.HeadDim;
        int blocks = BlockTable.BlocksFor(tokens);
        return new MemoryTable(
        [
            .. SavedRows(program, i => SavedBytes(program.Saved[i], tokens)),
            new(MemoryUse.SampleKv, "blocks", blocks, KvBytes(blocks)),
            new(MemoryUse.LayerGradient, "rows", tokens, ActivationBytes(tokens, _config.HiddenSize)),
            new(MemoryUse.KvGradients, "accumulators", 2, 2 * _backend.TensorBytes(tokens, kvColumns)),
            new(MemoryUse.Losses, "rows", tokens, _backend.TensorBytes(tokens, 1)),
        ]);
    }

    /// <summary>What the weights of an adapter hold.</summary>
    public MemoryTable OfAdapter(PeftConfig method)
    {
        BypassWeight[] tensors = [.. PeftAdapter.WeightsOf(method, _whole, _shard)];
        long bytes = tensors.Sum(t => AdapterTensor.BytesOf(_backend, t));
        return new MemoryTable([new(MemoryUse.AdapterWeights, "tensors", tensors.Length, bytes)]);
    }

    /// <summary>Keys and values of so many blocks.</summary>
    public long KvBytes(int blocks) =>
        _backend.KvCacheBytes(_config.LayerCount, blocks, _config.KeyValueHeads, _config.HeadDim);

    /// <summary>Scratch memory for inference alone, or for finetuning beside it.</summary>
    public long ScratchBytes(bool trains) => _backend.ScratchBytes(Scratch(trains));

    /// <summary>The largest calls that the passes will make.</summary>
    public ScratchLimits Scratch(bool trains) => new()
    {
        Rows = Limits.Rows,
        Segments = Math.Min(Limits.Rows, Limits.Sequences + (trains ? Limits.Windows : 0)),
        Positions = Limits.Positions,
        SampledRows = Limits.Sequences,
        HiddenColumns = _config.HiddenSize,
        Vocabulary = _config.VocabularySize,
        InputColumnsMax = _weights.Where(w => !w.IsVector).Max(w => w.Columns),
        QueryHeads = _config.AttentionHeads,
        KvHeads = _config.KeyValueHeads,
        HeadDim = _config.HeadDim,
        RankMax = Limits.RankMax,
        InnerMax = Limits.InnerMax,
        Trains = trains,
    };

    /// <summary>A row for each value of a layer that a job saves, over all layers.</summary>
    public static IEnumerable<MemoryRow> SavedRows(TrainingProgram program, Func<int, long> bytesOf) => program.Saved.Index()
        .GroupBy(s => s.Item.Role)
        .Select(g => new MemoryRow(MemoryUse.SavedActivations, g.Key, g.Count(), g.Sum(s => bytesOf(s.Index))));

    /// <summary>Bytes of rows of a model's values.</summary>
    public long ActivationBytes(int rows, int columns) => _backend.TensorBytes(rows, columns, TensorUse.Activation);

    /// <summary>Bytes of a saved value of so many tokens.</summary>
    public long SavedBytes(SavedValue value, int tokens) => _backend.TensorBytes(tokens, value.Columns, UseOf(value));

    /// <summary>What a saved value is allocated for: sums of exponentials are F32.</summary>
    public static TensorUse UseOf(SavedValue value) => value.Packed is PackedFormat format ? TensorUses.Of(format)
        : value.ByAttention ? TensorUse.Exact : TensorUse.Activation;

    private long ArenaBytes(int columns) => ActivationBytes(Limits.Rows, columns);
}
