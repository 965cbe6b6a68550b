namespace FlexLLM.Graph;

/// <summary>
/// Runs the passes in order: differentiate, prune, rematerialize, lower. (Parallelization, compression and memory planning take
/// their places before lowering.)
/// </summary>
internal sealed class GraphCompiler
{
    private readonly WeightTable _weights = new();
    private readonly int _layers;

    /// <param name="serving">The model with a bypass at every site that an adapter may use.</param>
    /// <param name="layers">Decoder layers.</param>
    public GraphCompiler(ParallelGraph serving, int layers)
    {
        _layers = layers;
        Forward = ForwardLowering.Lower(Train(serving), _weights);
    }

    /// <summary>The forward program of every batch.</summary>
    public ForwardProgram Forward { get; }

    /// <summary>Weights that the programs name, by index.</summary>
    public IReadOnlyList<string> WeightNames => _weights.Names;

    /// <summary>The backward program of a job whose graph has bypasses just where it trains.</summary>
    public TrainingProgram CompileTraining(ParallelGraph job) =>
        BackwardLowering.Lower(Rematerializer.Rematerialize(Train(job)), Forward, _weights, _layers);

    private static ParallelGraph Train(ParallelGraph forward) =>
        GraphPruner.Prune(Differentiator.Differentiate(GraphVerifier.Verify(forward)));
}
