using BenchmarkDotNet.Attributes;
using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Execution;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>Choice of one token.</summary>
public class SamplerKernels
{
    private const int Vocabulary = 32768;

    // How much the logits of a trained model differ: a few tokens hold most of the probability.
    private const double Deviation = 3;

    private readonly Sampler _sampler = new(Vocabulary);
    private readonly TokenHistory _history = new(countsTokens: false);
    private readonly SamplingParameters _greedy = new();
    private readonly SamplingParameters _topP = new() { Temperature = 0.8f, TopP = 0.9f, Seed = 1 };
    private readonly SamplingParameters _topK = new() { Temperature = 0.8f, TopK = 50, TopP = 0.9f, Seed = 1 };
    private readonly float[] _logits = new float[Vocabulary];
    private readonly List<IDisposable> _owned = [];
    private TokenChooser _chooser = null!;
    private DeviceTensor _row = null!;

    /// <summary>Makes one row of logits.</summary>
    [GlobalSetup]
    public void Setup()
    {
        var random = new SeededRandom(1);
        for (int i = 0; i < _logits.Length; i++)
        {
            _logits[i] = (float)(Deviation * random.NextGaussian());
        }

        var backend = new CpuBackend(threads: 1);
        _owned.Add(backend);
        _chooser = new TokenChooser(backend, Vocabulary, rowsMax: 1);
        _row = backend.Allocate(1, Vocabulary);
        _owned.Add(_row);
        backend.Upload(_logits, _row);
    }

    /// <summary>Frees the row, and the backend after it.</summary>
    [GlobalCleanup]
    public void Cleanup()
    {
        _owned.Reverse();
        _owned.ForEach(owned => owned.Dispose());
        _owned.Clear();
    }

    /// <summary>The likeliest token.</summary>
    [Benchmark]
    public int SampleGreedy() => _sampler.Sample(_logits, _greedy, _history).TokenId;

    /// <summary>Top-p 0.9 at temperature 0.8.</summary>
    [Benchmark]
    public int SampleTopP() => _sampler.Sample(_logits, _topP, _history).TokenId;

    /// <summary>Top-k 50 and top-p 0.9 at temperature 0.8, of the whole row.</summary>
    [Benchmark]
    public int SampleTopK() => _sampler.Sample(_logits, _topK, _history).TokenId;

    /// <summary>The same of the largest that the device tells, finding them included.</summary>
    [Benchmark]
    public int SampleTopKOnDevice()
    {
        _chooser.Clear();
        _chooser.Expect(_topK);
        _chooser.Read(_row);
        return _chooser.Choose(0, _topK, _history).TokenId;
    }
}
