using BenchmarkDotNet.Attributes;
using FlexLLM.Backends;

namespace FlexLLM.Benchmarks;

/// <summary>Operations that read no frozen weight.</summary>
public class RowKernels : KernelOperands
{
    private const int Heads = 14;
    private const int KvHeads = 2;
    private const int HeadDim = 64;
    private const int Context = 256;
    private const int Rank = 16;
    private const int SequencesMax = 16;

    private DeviceTensor _narrow = null!;
    private DeviceTensor _wide = null!;
    private DeviceTensor _query = null!;
    private DeviceTensor _heads = null!;
    private AttentionSegment[] _segments = [];
    private LoraSegment[] _bypasses = [];

    /// <summary>Up to sixteen sequences that decode after 256 tokens; more rows are one prefill chunk after 256 tokens.</summary>
    [Benchmark]
    public void Attention() => Backend.Attention(_query, _heads, 0, _segments);

    /// <summary>A bypass of rank 16 beside the up projection.</summary>
    [Benchmark]
    public void LoraBypass() => Backend.LoraBypass(_narrow, _bypasses, _wide);

    private protected override void MakeOperands()
    {
        _narrow = Tensor(Rows, Hidden);
        _wide = Tensor(Rows, Intermediate);
        _query = Tensor(Rows, Heads * HeadDim);
        _heads = Tensor(Rows, Heads * HeadDim);
        DeviceFactor a = Own(Backend.CreateFactor(Rank, Hidden));
        DeviceFactor b = Own(Backend.CreateFactor(Rank, Intermediate));
        Backend.Upload(Floats(Rank * Hidden), a.Values);
        Backend.Upload(Floats(Rank * Intermediate), b.Values);
        Backend.RefreshFactor(a);
        Backend.RefreshFactor(b);
        _bypasses = [new LoraSegment(0, Rows, a, b, 1f)];

        int sequences = Rows <= SequencesMax ? Rows : 1;
        int rowsOfEach = Rows / sequences;
        int blocks = (Context + rowsOfEach + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock;
        int tokens = blocks * DeviceKvCache.TokensPerBlock;
        DeviceKvCache cache = Own(Backend.CreateKvCache(1, blocks * sequences, KvHeads, HeadDim));
        DeviceTensor keys = Tensor(tokens, KvHeads * HeadDim);
        DeviceTensor values = Tensor(tokens, KvHeads * HeadDim);
        _segments = new AttentionSegment[sequences];
        for (int i = 0; i < sequences; i++)
        {
            int[] table = [.. Enumerable.Range(i * blocks, blocks)];
            Backend.AppendKv(keys, values, 0, [new AttentionSegment(0, tokens, 0, cache, table)]);
            _segments[i] = new AttentionSegment(i * rowsOfEach, rowsOfEach, Context, cache, table);
        }
    }
}
