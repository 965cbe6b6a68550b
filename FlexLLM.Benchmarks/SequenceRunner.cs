using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>One sequence with its own KV cache, driven through the forward pass without an engine.</summary>
internal sealed class SequenceRunner : IDisposable
{
    private readonly LoadedModel _model;
    private readonly DeviceKvCache _cache;
    private readonly int[] _blockTable;

    public SequenceRunner(LoadedModel model, int tokensMax, PeftAdapter? adapter = null)
    {
        _model = model;
        Adapter = adapter;
        int blocks = (tokensMax + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock;
        _cache = model.Backend.CreateKvCache(model.Config.LayerCount, blocks, model.Config.KeyValueHeads, model.Config.HeadDim);
        _blockTable = [.. Enumerable.Range(0, blocks)];
    }

    public PeftAdapter? Adapter { get; }

    /// <summary>Tokens computed so far.</summary>
    public int Length { get; private set; }

    /// <summary>
    /// Appends rows to a batch that the caller runs; asks for the logits of the last <paramref name="sampled"/>.
    /// </summary>
    public void AddTo(TokenBatch batch, ReadOnlySpan<int> ids, int sampled)
    {
        batch.AddInference(ids, Length, _cache, _blockTable, Adapter, sampled);
        Length += ids.Length;
    }

    /// <summary>Runs ids alone in one step and returns the logits of the last <paramref name="sampled"/> rows.</summary>
    public float[] Run(ForwardPass pass, TokenBatch batch, ReadOnlySpan<int> ids, int sampled)
    {
        batch.Clear();
        AddTo(batch, ids, sampled);
        float[] logits = new float[sampled * _model.Config.VocabularySize];
        _model.Backend.Download(pass.Run(batch), logits);
        return logits;
    }

    /// <summary>Goes back to a shorter length: the next tokens take the places of those behind it.</summary>
    public void Rewind(int length)
    {
        Check.That(length >= 0 && length <= Length);
        Length = length;
    }

    public void Dispose() => _cache.Dispose();
}
