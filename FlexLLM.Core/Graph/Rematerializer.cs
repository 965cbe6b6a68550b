namespace FlexLLM.Graph;

/// <summary>How far rematerialization goes.</summary>
internal sealed record RematerializationOptions
{
    /// <summary>Drops what is cheap to compute again. Off: only what the forward pass leaves nowhere is computed again.</summary>
    public bool DropsCheap { get; init; } = true;

    /// <summary>
    /// Most 32-bit elements saved per token over all layers; while there are more, linears and attention are computed again too,
    /// those first that free most for their arithmetic. Null: nothing is forced.
    /// </summary>
    public long? SavedColumnsMax { get; init; }

    /// <summary>Length of a sample, in tokens: what attention costs to compute again.</summary>
    public int SequenceTokens { get; init; } = 1024;

    /// <summary>Roles of sums over ranks: to compute one again takes another collective, so none is.</summary>
    public IReadOnlySet<string> SummedRoles { get; init; } = new HashSet<string>();
}

/// <summary>
/// Paper section 5.2, second half: what can be computed again from values that are kept anyway need not be kept itself. It runs in
/// the backward pass, before its first reader in its layer, with the forward pass's own operations, so not a bit changes.
/// Largest values first; then, under a budget, those that free most bytes for their arithmetic.
/// </summary>
internal sealed class Rematerializer
{
    /// <summary>Ends the name of a value that was computed again.</summary>
    public const string Suffix = " again";

    private readonly ParallelGraph _graph;
    private readonly GraphNode?[] _producers;
    private readonly HashSet<int> _cached;
    private readonly HashSet<int> _unsavable;
    private readonly RematerializationOptions _options;

    private Rematerializer(ParallelGraph graph, RematerializationOptions options)
    {
        _graph = graph;
        _options = options;
        _producers = graph.ForwardProducers();
        _cached = graph.CachedValues();

        // Inside a network rows live in scratch memory of the bypass; nothing outside can save them.
        _unsavable = [.. graph.Nodes.Where(n => !n.IsBackward && n.Site >= 0).SelectMany(n => n.Outputs)];
    }

    /// <summary>Takes a pruned graph; returns it with nodes that compute again in place of saved values.</summary>
    public static ParallelGraph Rematerialize(ParallelGraph graph, RematerializationOptions? options = null)
    {
        var pass = new Rematerializer(graph, options ?? new RematerializationOptions());
        Layer[] layers = [.. graph.Nodes.Where(n => n.IsBackward && n.Layer >= 0).GroupBy(n => n.Layer).Select(pass.Of)];
        foreach (Layer layer in layers)
        {
            pass.DropCheap(layer);
        }

        pass.DropUnderBudget(layers);
        return GraphVerifier.Verify(pass.Insert(layers.ToDictionary(l => l.Index)));
    }

    private Layer Of(IGrouping<int, GraphNode> backward)
    {
        HashSet<int> read = [];
        foreach (int input in backward.SelectMany(n => n.Inputs))
        {
            Add(input);
        }

        return new Layer(backward.Key, read, [.. read.Where(v => !_unsavable.Contains(v))]);

        // What cannot be saved must be computed again: what that reads is needed as if the backward pass read it.
        void Add(int value)
        {
            if (_graph.IsActivation(value) && !_cached.Contains(value) && read.Add(value) && _unsavable.Contains(value))
            {
                foreach (int input in _producers[value]!.Inputs)
                {
                    Add(input);
                }
            }
        }
    }

    private void DropCheap(Layer layer)
    {
        if (!_options.DropsCheap)
        {
            return;
        }

        foreach (int value in layer.Kept.OrderByDescending(id => _graph.Values[id].Columns).ThenBy(id => id).ToArray())
        {
            layer.Kept.Remove(value);
            if (Recomputed(layer) is not List<GraphNode> nodes || nodes.Any(n => !OpCosts.IsCheap(n.Op)))
            {
                layer.Kept.Add(value);
            }
        }
    }

    private void DropUnderBudget(Layer[] layers)
    {
        if (_options.SavedColumnsMax is not long most)
        {
            return;
        }

        long saved = layers.Sum(l => l.Kept.Sum(v => (long)_graph.Values[v].Columns));
        var queue = new PriorityQueue<(Layer Layer, int Value), (double, int)>();
        foreach (Layer layer in layers)
        {
            Enqueue(layer);
        }

        while (saved > most && queue.TryDequeue(out (Layer Layer, int Value) best, out _))
        {
            best.Layer.Kept.Remove(best.Value);
            saved -= _graph.Values[best.Value].Columns;
            Enqueue(best.Layer);
        }

        if (saved > most && layers.MinBy(l => l.Index) is Layer lowest)
        {
            KeepInput(lowest);
        }

        // The candidate of a layer that frees most elements a flop: few flops an element come first, equal ones from the bottom.
        void Enqueue(Layer layer)
        {
            double before = Flops(Recomputed(layer)!);
            (int Value, double Price)? best = null;
            foreach (int value in layer.Kept.Order().ToArray())
            {
                layer.Kept.Remove(value);
                if (Recomputed(layer) is List<GraphNode> nodes)
                {
                    double price = (Flops(nodes) - before) / _graph.Values[value].Columns;
                    best = best is null || price < best.Value.Price ? (value, price) : best;
                }

                layer.Kept.Add(value);
            }

            if (best is (int chosen, double cost))
            {
                queue.Enqueue((layer, chosen), (cost, layer.Index));
            }
        }
    }

    /// <summary>
    /// The lowest layer's backward pass does not read the layer's input. Kept all the same, it leaves less to keep: everything else
    /// can be made from it again. Where that frees nothing, the layer stays as it is.
    /// </summary>
    private void KeepInput(Layer layer)
    {
        int[] before = [.. layer.Kept];
        HashSet<int> inputs =
        [
            .. _graph.Nodes.Where(n => !n.IsBackward && n.Layer == layer.Index).SelectMany(n => n.Inputs)
                .Where(i => _graph.IsActivation(i) && _producers[i]!.Layer != layer.Index),
        ];
        layer.Kept.UnionWith(inputs);
        foreach (int value in layer.Kept.Except(inputs).OrderByDescending(id => _graph.Values[id].Columns).ThenBy(id => id).ToArray())
        {
            layer.Kept.Remove(value);
            if (Recomputed(layer) is null)
            {
                layer.Kept.Add(value);
            }
        }

        if (layer.Kept.Sum(Columns) >= before.Sum(Columns))
        {
            layer.Kept.Clear();
            layer.Kept.UnionWith(before);
        }

        long Columns(int value) => _graph.Values[value].Columns;
    }

    private double Flops(List<GraphNode> nodes) => nodes.Sum(n => OpCosts.FlopsOf(_graph, n, _options.SequenceTokens));

    /// <summary>
    /// The forward nodes that must run again so that a layer's backward pass has all it reads; null where the values kept, the
    /// weights and the KV cache do not suffice.
    /// </summary>
    private List<GraphNode>? Recomputed(Layer layer)
    {
        var nodes = new List<GraphNode>();
        var seen = new HashSet<int>();
        return layer.Read.All(Visit) ? nodes : null;

        bool Visit(int value)
        {
            if (!_graph.IsActivation(value) || layer.Kept.Contains(value) || _cached.Contains(value) || !seen.Add(value))
            {
                return true;
            }

            // A layer's input belongs to the layer below, whose values are gone by then or not yet there.
            GraphNode? node = _producers[value];
            if (node is null || node.Layer != layer.Index || !OpCosts.CanRecompute(node.Op) || IsLogSumExp(node, value) ||
                _options.SummedRoles.Contains(PassReport.RoleOf(_graph.Values[value].Name)) || !node.Inputs.All(Visit))
            {
                return false;
            }

            nodes.Add(node);
            return true;
        }
    }

    // Attention leaves it where the backward pass finds it; it is smaller than anything that it could be had from.
    private static bool IsLogSumExp(GraphNode node, int value) => node.Op == OpKind.Attention && node.Outputs[1] == value;

    private ParallelGraph Insert(Dictionary<int, Layer> layers)
    {
        List<GraphValue> values = [.. _graph.Values];
        var nodes = new List<GraphNode>(_graph.Nodes.Count);
        var made = new Dictionary<(int Layer, int Value), int>();
        foreach (GraphNode node in _graph.Nodes)
        {
            if (!node.IsBackward || node.Layer < 0)
            {
                nodes.Add(node);
                continue;
            }

            nodes.Add(node with { Inputs = [.. node.Inputs.Select(i => Available(i, layers[node.Layer]))] });
        }

        return ParallelGraph.With(values, nodes);

        int Available(int value, Layer layer)
        {
            if (!_graph.IsActivation(value) || layer.Kept.Contains(value) || _cached.Contains(value))
            {
                return value;
            }

            if (!made.TryGetValue((layer.Index, value), out int copy))
            {
                GraphNode node = _producers[value]!;
                int[] inputs = [.. node.Inputs.Select(i => Available(i, layer))];
                int[] outputs = [.. node.Outputs.Select(Again)];
                nodes.Add(node with { Inputs = inputs, Outputs = outputs, IsBackward = true, Recomputes = true });
                copy = made[(layer.Index, value)];
            }

            return copy;

            int Again(int output)
            {
                values.Add(_graph.Values[output] with { Id = values.Count, Name = _graph.Values[output].Name + Suffix });
                made[(layer.Index, output)] = values.Count - 1;
                return values.Count - 1;
            }
        }
    }

    /// <summary>One layer's backward pass: the activations that it reads, and those of them that are kept for it.</summary>
    private sealed record Layer(int Index, HashSet<int> Read, HashSet<int> Kept);
}
