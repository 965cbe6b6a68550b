namespace FlexLLM.Graph;

/// <summary>What the passes do for a job beyond what they always do.</summary>
internal sealed record CompilerOptions
{
    public RematerializationOptions Rematerialization { get; init; } = new();

    /// <summary>Keeps a bit where a bit is all that is read.</summary>
    public bool Compresses { get; init; } = true;

    /// <summary>Keeps saved values in bfloat16: half the bytes, gradients that are not exact any more.</summary>
    public bool StoresSavedAsBF16 { get; init; }

    /// <summary>Off only to show what pruning does not change: every gradient that could be asked for is computed.</summary>
    public bool Prunes { get; init; } = true;
}

/// <summary>A graph after each pass, by the name of the pass.</summary>
internal sealed record PassResult(string Pass, ParallelGraph Graph);

/// <summary>
/// Runs the passes in order: differentiate, prune, rematerialize, compress, fuse, then lower, which plans the memory on its way.
/// </summary>
internal sealed class GraphCompiler
{
    private readonly WeightTable _weights = new();
    private readonly int _layers;

    /// <param name="serving">
    /// The model with a place for a bypass wherever an adapter may have one. Its last layer's output is named "final.input".
    /// </param>
    /// <param name="layers">Decoder layers.</param>
    public GraphCompiler(ParallelGraph serving, int layers)
    {
        _layers = layers;
        ParallelGraph graph = Differentiator.Differentiate(GraphVerifier.Verify(serving));
        Forward = ForwardLowering.Lower(GraphPruner.Prune(graph, "d final.input"), _weights);
    }

    /// <summary>The forward program of every batch.</summary>
    public ForwardProgram Forward { get; }

    /// <summary>Weights that the programs name, by index.</summary>
    public IReadOnlyList<string> WeightNames => _weights.Names;

    /// <summary>The graph after each pass, in order, from the job's forward graph.</summary>
    public static IEnumerable<PassResult> Passes(ParallelGraph job, CompilerOptions options)
    {
        ParallelGraph graph = GraphVerifier.Verify(job);
        yield return new PassResult("build", graph);
        graph = Differentiator.Differentiate(graph);
        yield return new PassResult("differentiate", graph);
        if (options.Prunes)
        {
            graph = GraphPruner.Prune(graph);
            yield return new PassResult("prune", graph);
        }

        graph = Rematerializer.Rematerialize(graph, options.Rematerialization);
        yield return new PassResult("rematerialize", graph);
        if (options.Compresses || options.StoresSavedAsBF16)
        {
            graph = Compressor.Compress(graph, options.StoresSavedAsBF16);
            yield return new PassResult("compress", graph);
        }

        yield return new PassResult("fuse", BypassFusion.Fuse(graph));
    }

    /// <summary>The backward program of a job whose graph has the networks that it trains, and no others.</summary>
    public TrainingProgram CompileTraining(ParallelGraph job, CompilerOptions? options = null) =>
        LowerTraining(Passes(job, options ?? new CompilerOptions()).Last().Graph);

    /// <summary>The backward program of a job's graph after the last of <see cref="Passes"/>.</summary>
    public TrainingProgram LowerTraining(ParallelGraph graph) => BackwardLowering.Lower(graph, Forward, _weights, _layers);
}
