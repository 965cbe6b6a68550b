using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>
/// What one sample keeps between its forward windows and its backward items, indexed by absolute position: exactly the
/// values that the pruner left for the backward pass, the sample's keys and values, the gradient between layers, the key and
/// value gradients of the layer in progress (paper section 6.1), and the losses.
/// </summary>
internal sealed class ActivationStore : IDisposable
{
    private readonly DeviceTensor[] _saved;
    private readonly DeviceTensor?[] _logSumExp;
    private readonly ResourceSet _owned = new();

    public ActivationStore(LoadedModel model, TrainingProgram program, int tokensMax)
    {
        IComputeBackend backend = model.Backend;
        ModelConfig config = model.Config;
        Program = program;
        TokensMax = tokensMax;
        int blocks = (tokensMax + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock;
        BlockTable = [.. Enumerable.Range(0, blocks)];
        try
        {
            _saved = [.. program.Saved.Select(s => _owned.Add(backend.Allocate(tokensMax, s.Columns, MemoryPlan.UseOf(s))))];
            KvCache = _owned.Add(backend.CreateKvCache(config.LayerCount, blocks, config.KeyValueHeads, config.HeadDim));
            Boundary = _owned.Add(backend.Allocate(tokensMax, config.HiddenSize, TensorUse.Activation));
            KeyGradient = _owned.Add(backend.Allocate(tokensMax, config.KeyValueHeads * config.HeadDim));
            ValueGradient = _owned.Add(backend.Allocate(tokensMax, config.KeyValueHeads * config.HeadDim));
            Losses = _owned.Add(backend.Allocate(tokensMax, 1));
        }
        catch
        {
            Dispose();
            throw;
        }

        _logSumExp = new DeviceTensor?[config.LayerCount];
        for (int i = 0; i < _saved.Length; i++)
        {
            if (program.Saved[i].ByAttention)
            {
                _logSumExp[program.Saved[i].Layer] = _saved[i];
            }
        }
    }

    public TrainingProgram Program { get; }

    /// <summary>Longest sample that fits, in tokens.</summary>
    public int TokensMax { get; }

    public DeviceKvCache KvCache { get; }

    public int[] BlockTable { get; }

    /// <summary>dLoss/d(output of the layer in progress), [tokens, hidden].</summary>
    public DeviceTensor Boundary { get; }

    public DeviceTensor KeyGradient { get; }

    public DeviceTensor ValueGradient { get; }

    /// <summary>Of each position whose forward window has run, [tokens, 1].</summary>
    public DeviceTensor Losses { get; }

    /// <summary>What the store holds, in the rows of <see cref="MemoryPlan.OfJob"/>.</summary>
    public IEnumerable<MemoryRow> Memory() =>
    [
        .. MemoryPlan.SavedRows(Program, i => _saved[i].Bytes),
        new(MemoryUse.SampleKv, "blocks", KvCache.Blocks, KvCache.Bytes),
        new(MemoryUse.LayerGradient, "rows", TokensMax, Boundary.Bytes),
        new(MemoryUse.KvGradients, "accumulators", 2, KeyGradient.Bytes + ValueGradient.Bytes),
        new(MemoryUse.Losses, "rows", TokensMax, Losses.Bytes),
    ];

    public DeviceTensor Saved(int index) => _saved[index];

    /// <summary>Where attention of a layer leaves its log-sum-exp; null where no backward pass reads it.</summary>
    public DeviceTensor? LogSumExp(int layer) => _logSumExp[layer];

    public void Dispose() => _owned.Dispose();
}
