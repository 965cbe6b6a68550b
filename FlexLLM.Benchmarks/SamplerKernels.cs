using BenchmarkDotNet.Attributes;
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
    private readonly float[] _logits = new float[Vocabulary];

    /// <summary>Makes one row of logits.</summary>
    [GlobalSetup]
    public void Setup()
    {
        var random = new SeededRandom(1);
        for (int i = 0; i < _logits.Length; i++)
        {
            _logits[i] = (float)(Deviation * random.NextGaussian());
        }
    }

    /// <summary>The likeliest token.</summary>
    [Benchmark]
    public int SampleGreedy() => _sampler.Sample(_logits, _greedy, _history).TokenId;

    /// <summary>Top-p 0.9 at temperature 0.8.</summary>
    [Benchmark]
    public int SampleTopP() => _sampler.Sample(_logits, _topP, _history).TokenId;
}
