using BenchmarkDotNet.Attributes;
using FlexLLM.Adapters;
using FlexLLM.Graph;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks;

/// <summary>All passes and the lowering of a LoRA job on the shape of LLaMA-3.1-70B, by its number of layers.</summary>
public class CompilerBenchmarks
{
    private ModelConfig _config = null!;
    private GraphCompiler _compiler = null!;
    private IReadOnlyDictionary<int, BypassNetwork> _networks = null!;

    /// <summary>Decoder layers; 80 is the model.</summary>
    [Params(20, 40, 80)]
    public int Layers { get; set; }

    /// <summary>Compiles the forward program, which jobs share.</summary>
    [GlobalSetup]
    public void Setup()
    {
        _config = ModelShapes.Of("llama-3.1-70b") with { LayerCount = Layers };
        _compiler = new GraphCompiler(DecoderBuilder.BuildServing(_config), Layers);
        _networks = PeftAdapter.NetworksOf(new LoraConfig { Rank = 16, TargetModules = ["down_proj"] }, _config);
    }

    /// <summary>From the decoder's graph to a job's backward program.</summary>
    [Benchmark]
    public object CompileJob() => _compiler.CompileTraining(DecoderBuilder.BuildTraining(_config, _networks));
}
