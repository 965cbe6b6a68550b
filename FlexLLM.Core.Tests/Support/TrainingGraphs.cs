using FlexLLM.Adapters;
using FlexLLM.Graph;
using FlexLLM.Models;

namespace FlexLLM.Tests.Support;

/// <summary>Graphs of jobs without a model.</summary>
internal static class TrainingGraphs
{
    /// <summary>LoRA at these sites.</summary>
    public static ParallelGraph Lora(ModelConfig config, IEnumerable<int> sites, int rank = 2) =>
        DecoderBuilder.BuildTraining(config, sites.ToDictionary(s => s, BypassNetwork (_) => new LoraNetwork(rank)));

    /// <summary>LoRA at these modules of every layer.</summary>
    public static ParallelGraph Lora(ModelConfig config, params AdapterModule[] modules) =>
        Lora(config, AdapterSites.Of(config.LayerCount, modules));

    /// <summary>A method in every layer.</summary>
    public static ParallelGraph Of(ModelConfig config, PeftConfig method) =>
        DecoderBuilder.BuildTraining(config, PeftAdapter.NetworksOf(method, config));

    /// <summary>The graph after a pass.</summary>
    public static ParallelGraph After(string pass, ParallelGraph job, CompilerOptions? options = null) =>
        GraphCompiler.Passes(job, options ?? new CompilerOptions()).Single(p => p.Pass == pass).Graph;

    /// <summary>The program of a job.</summary>
    public static TrainingProgram Compile(ModelConfig config, ParallelGraph job, CompilerOptions? options = null) =>
        new GraphCompiler(DecoderBuilder.BuildServing(config), config.LayerCount).CompileTraining(job, options);
}
