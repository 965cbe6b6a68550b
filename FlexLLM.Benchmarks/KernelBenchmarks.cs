using BenchmarkDotNet.Attributes;
using BenchmarkDotNet.Configs;
using BenchmarkDotNet.Jobs;
using BenchmarkDotNet.Running;
using BenchmarkDotNet.Toolchains.InProcess.Emit;
using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Execution;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `kernels`: micro-benchmarks of the backend's operations and of the sampler, on the widths of qwen2.5-0.5b. Arguments go to
/// BenchmarkDotNet (--filter, --job, --list).
/// </summary>
public class KernelBenchmarks
{
    /// <summary>Arguments of the verb.</summary>
    public const string Usage = "[--filter '*Linear*'] [other options of BenchmarkDotNet]";

    private const int Hidden = 896;
    private const int Intermediate = 4864;
    private const int Heads = 14;
    private const int KvHeads = 2;
    private const int HeadDim = 64;
    private const int Context = 256;
    private const int Rank = 16;
    private const int Vocabulary = 32768;

    private readonly List<IDisposable> _owned = [];
    private readonly Sampler _sampler = new(Vocabulary);
    private readonly TokenHistory _history = new(countsTokens: false);
    private CpuBackend _backend = null!;
    private DeviceWeight _up = null!;
    private DeviceWeight _head = null!;
    private DeviceTensor _narrow = null!;
    private DeviceTensor _narrowResult = null!;
    private DeviceTensor _wide = null!;
    private DeviceTensor _query = null!;
    private DeviceTensor _heads = null!;
    private AttentionSegment[] _segments = [];
    private LoraSegment[] _bypasses = [];
    private int[] _targets = [];
    private float[] _losses = [];
    private float[] _logits = [];

    /// <summary>Rows of the batch: one decoding sequence, a decode batch, a prefill chunk.</summary>
    [Params(1, 16, 256)]
    public int Rows { get; set; }

    /// <summary>Storage of the frozen weights.</summary>
    [Params(DType.F32, DType.BF16)]
    public DType Weights { get; set; }

    /// <summary>Runs what the arguments choose; everything without a filter.</summary>
    public static int Run(string[] args)
    {
        // In this process: a generated project would inherit the rules of this repository and not pass them.
        IConfig config = DefaultConfig.Instance.AddJob(Job.ShortRun.WithToolchain(InProcessEmitToolchain.Instance));
        string[] all = args.Contains("--filter") || args.Contains("--list") ? args : [.. args, "--filter", "*"];
        return BenchmarkSwitcher.FromTypes([typeof(KernelBenchmarks)]).Run(all, config).All(s => !s.HasCriticalValidationErrors) ? 0 : 2;
    }

    /// <summary>Fills every operand with random numbers.</summary>
    [GlobalSetup]
    public void Setup()
    {
        var random = new SeededRandom(1);
        _backend = Own(new CpuBackend(Environment.ProcessorCount));
        _up = Weight(Intermediate, Hidden, ref random);
        _head = Weight(Vocabulary, Hidden, ref random);
        _narrow = Tensor(Rows, Hidden, ref random);
        _narrowResult = Own(_backend.Allocate(Rows, Hidden));
        _wide = Tensor(Rows, Intermediate, ref random);
        _query = Tensor(Rows, Heads * HeadDim, ref random);
        _heads = Own(_backend.Allocate(Rows, Heads * HeadDim));
        _targets = [.. Enumerable.Range(0, Rows)];
        _losses = new float[Rows];
        _logits = Floats(Vocabulary, ref random);
        DeviceLora lora = Own(_backend.CreateLora(Hidden, Intermediate, Rank));
        _backend.Upload(Floats(Rank * Hidden, ref random), lora.A);
        _backend.Upload(Floats(Rank * Intermediate, ref random), lora.BTransposed);
        _backend.RefreshLora(lora);
        _bypasses = [new LoraSegment(0, Rows, lora, 1f)];
        SetUpCache(ref random);
    }

    /// <summary>Frees the operands, and the backend after them.</summary>
    [GlobalCleanup]
    public void Cleanup()
    {
        for (int i = _owned.Count - 1; i >= 0; i--)
        {
            _owned[i].Dispose();
        }

        _owned.Clear();
    }

    /// <summary>Up projection.</summary>
    [Benchmark]
    public void Linear() => _backend.Linear(_narrow, _up, null, _wide, accumulate: false);

    /// <summary>Its gradient.</summary>
    [Benchmark]
    public void LinearBackwardInput() => _backend.LinearBackwardInput(_wide, _up, _narrowResult, accumulate: false);

    /// <summary>A bypass of rank 16 beside the up projection.</summary>
    [Benchmark]
    public void LoraBypass() => _backend.LoraBypass(_narrow, _bypasses, _wide);

    /// <summary>Up to sixteen sequences that decode after 256 tokens; more rows are one prefill chunk.</summary>
    [Benchmark]
    public void Attention() => _backend.Attention(_query, _heads, 0, _segments);

    /// <summary>Loss and its gradient over a vocabulary of 32,768.</summary>
    [Benchmark]
    public void FusedLinearCrossEntropy() =>
        _backend.FusedLinearCrossEntropy(_narrow, _targets, _head, 1f, _narrowResult, _losses);

    /// <summary>The likeliest token for every row.</summary>
    [Benchmark]
    public int SampleGreedy() => Sample(new SamplingParameters());

    /// <summary>Top-p 0.9 at temperature 0.8 for every row.</summary>
    [Benchmark]
    public int SampleTopP() => Sample(new SamplingParameters { Temperature = 0.8f, TopP = 0.9f, Seed = 1 });

    private int Sample(SamplingParameters parameters)
    {
        int sum = 0;
        for (int i = 0; i < Rows; i++)
        {
            sum += _sampler.Sample(_logits, parameters, _history).TokenId;
        }

        return sum;
    }

    private void SetUpCache(ref SeededRandom random)
    {
        int sequences = Rows <= 16 ? Rows : 1;
        int rowsOfEach = Rows / sequences;
        int blocks = (Context + rowsOfEach + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock;
        DeviceKvCache cache = Own(_backend.CreateKvCache(1, blocks * sequences, KvHeads, HeadDim));
        int tokens = blocks * DeviceKvCache.TokensPerBlock;
        _segments = new AttentionSegment[sequences];
        for (int i = 0; i < sequences; i++)
        {
            int[] table = [.. Enumerable.Range(i * blocks, blocks)];
            using DeviceTensor k = Fresh(tokens, KvHeads * HeadDim, ref random);
            using DeviceTensor v = Fresh(tokens, KvHeads * HeadDim, ref random);
            _backend.AppendKv(k, v, 0, [new AttentionSegment(0, tokens, 0, cache, table)]);
            _segments[i] = new AttentionSegment(i * rowsOfEach, rowsOfEach, Context, cache, table);
        }
    }

    private unsafe DeviceWeight Weight(int outFeatures, int inFeatures, ref SeededRandom random)
    {
        float[] values = Floats(outFeatures * inFeatures, ref random);
        fixed (float* data = values)
        {
            return Own(_backend.CreateWeight(new HostMatrix((byte*)data, DType.F32, outFeatures, inFeatures), Weights));
        }
    }

    private DeviceTensor Tensor(int rows, int columns, ref SeededRandom random) => Own(Fresh(rows, columns, ref random));

    private DeviceTensor Fresh(int rows, int columns, ref SeededRandom random)
    {
        DeviceTensor tensor = _backend.Allocate(rows, columns);
        _backend.Upload(Floats(rows * columns, ref random), tensor);
        return tensor;
    }

    private static float[] Floats(int count, ref SeededRandom random)
    {
        float[] values = new float[count];
        for (int i = 0; i < count; i++)
        {
            values[i] = random.NextSingle() - 0.5f;
        }

        return values;
    }

    private T Own<T>(T resource)
        where T : IDisposable
    {
        _owned.Add(resource);
        return resource;
    }
}
