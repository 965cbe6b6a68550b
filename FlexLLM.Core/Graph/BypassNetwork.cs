using FlexLLM.Graph.Parallelization;

namespace FlexLLM.Graph;

/// <summary>Which value of a linear module a bypass reads, and to which it is added: one tap, one add.</summary>
internal enum BypassAttachment
{
    /// <summary>Reads the module's input, added to its output (LoRA).</summary>
    Around,

    /// <summary>Reads the module's output and is added to it (serial Adapter; (IA)^3 on keys and values).</summary>
    Output,

    /// <summary>Reads the module's input and is added to it, before the module ((IA)^3 on the inner activation).</summary>
    Input,

    /// <summary>
    /// As <see cref="Around"/>, on a group of ranks, where the network's result is added after the sum over ranks instead of before.
    /// </summary>
    AroundReduced,
}

/// <summary>How a trainable tensor starts, so that a new adapter answers like the bare model.</summary>
internal enum BypassInitialization
{
    Zero,
    One,

    /// <summary>Uniform in +-1/sqrt(wide): Kaiming with a = sqrt 5, PEFT's choice.</summary>
    KaimingUniform,
}

/// <summary>A trainable tensor of a bypass: a matrix [inner, wide], or a vector of Wide elements (Inner is 0).</summary>
internal sealed record BypassWeight(string Name, int Inner, int Wide, BypassInitialization Initialization)
{
    /// <summary>The matrix leads from the inner side to the wide one (LoRA's B), not to it.</summary>
    public bool Widens { get; init; }

    public bool IsVector => Inner == 0;

    public long Count => Math.Max(1L, Inner) * Wide;
}

/// <summary>
/// A PEFT method at one module: f_A of Y = f_B(X) + f_A(X) (paper section 3). A method is its attachment, its weights and the
/// operations that <see cref="Build"/> appends; differentiation, pruning, planning, serving, optimizing and checkpoints follow
/// from these. A new method needs another of these records and, where it brings a new operation, that operation's gradient rule.
/// </summary>
internal abstract record BypassNetwork
{
    public abstract BypassAttachment Attachment { get; }

    /// <summary>Width of the trainable path between tap and add; 0 where there is none.</summary>
    public abstract int Inner { get; }

    /// <summary>LoRA alone: forward and backward are one backend call each, for many adapters at once.</summary>
    public virtual bool IsLora => false;

    /// <summary>Trainable tensors in a fixed order, for a tap and an add of these widths.</summary>
    public abstract IReadOnlyList<BypassWeight> Weights(int tapColumns, int addColumns);

    /// <summary>Appends the network's operations and returns its result, which the caller adds.</summary>
    public abstract int Build(BypassBuilder b);

    /// <summary>The same chain of operators as the search over parallel plans sees it.</summary>
    public abstract Bypass ToBypass(int tapColumns, int addColumns);
}

/// <summary>f = scale * (x A^T) B^T with A [rank, in] and B, held transposed, [rank, out].</summary>
internal sealed record LoraNetwork(int Rank) : BypassNetwork
{
    public override BypassAttachment Attachment => BypassAttachment.Around;

    public override int Inner => Rank;

    public override bool IsLora => true;

    public override IReadOnlyList<BypassWeight> Weights(int tapColumns, int addColumns) =>
    [
        new("lora_A", Rank, tapColumns, BypassInitialization.KaimingUniform),
        new("lora_B", Rank, addColumns, BypassInitialization.Zero) { Widens = true },
    ];

    public override int Build(BypassBuilder b) => b.Widen(b.Narrow(b.X, 0, scaled: true), 1);

    public override Bypass ToBypass(int tapColumns, int addColumns) => Bypass.Lora(tapColumns, addColumns, Rank);
}

/// <summary>f = act(x D^T + b1) U + b2 on a module's output, added to it (Houlsby et al. 2019): x is kept by the add itself.</summary>
internal sealed record SerialAdapterNetwork(int Size, bool UsesSilu) : BypassNetwork
{
    public override BypassAttachment Attachment => BypassAttachment.Output;

    public override int Inner => Size;

    public override IReadOnlyList<BypassWeight> Weights(int tapColumns, int addColumns) =>
    [
        new("adapter_down", Size, tapColumns, BypassInitialization.KaimingUniform),
        new("adapter_down_bias", 0, Size, BypassInitialization.Zero),
        new("adapter_up", Size, addColumns, BypassInitialization.Zero) { Widens = true },
        new("adapter_up_bias", 0, addColumns, BypassInitialization.Zero),
    ];

    public override int Build(BypassBuilder b)
    {
        int z = b.AddBias(b.Narrow(b.X, 0), 1);
        return b.AddBias(b.Widen(UsesSilu ? b.Silu(z) : b.Relu(z), 2), 3);
    }

    public override Bypass ToBypass(int tapColumns, int addColumns) => Bypass.SerialAdapter(addColumns, Size);
}

/// <summary>f = x * (l - 1), so that the sum is x * l: (IA)^3 (Liu et al. 2022).</summary>
internal sealed record ScaleNetwork(BypassAttachment Place) : BypassNetwork
{
    public override BypassAttachment Attachment => Place;

    public override int Inner => 0;

    public override IReadOnlyList<BypassWeight> Weights(int tapColumns, int addColumns) =>
        [new("ia3_l", 0, tapColumns, BypassInitialization.One)];

    public override int Build(BypassBuilder b) => b.ScaleColumns(b.X, 0);

    public override Bypass ToBypass(int tapColumns, int addColumns) => Bypass.Scale(addColumns);
}

/// <summary>The operations that networks are made of, at one site of a graph.</summary>
/// <param name="graph">Where they are appended.</param>
/// <param name="site">The adapter site.</param>
/// <param name="name">Prefix of the values' names.</param>
/// <param name="weightPrefix">Prefix of the weights' names.</param>
/// <param name="network">The network to build.</param>
/// <param name="x">The value that it taps.</param>
/// <param name="addColumns">Width of the value that it is added to.</param>
internal sealed class BypassBuilder(
    GraphBuilder graph, int site, string name, string weightPrefix, BypassNetwork network, int x, int addColumns)
{
    private readonly IReadOnlyList<BypassWeight> _weights = network.Weights(graph[x].Columns, addColumns);
    private int _steps;

    public int X => x;

    public int Narrow(int value, int weight, bool scaled = false) =>
        Op(OpKind.Narrow, _weights[weight].Inner, value, weight, scaled);

    public int Widen(int u, int weight) => Op(OpKind.Widen, _weights[weight].Wide, u, weight);

    public int AddBias(int value, int weight) => Op(OpKind.AddBias, graph[value].Columns, value, weight);

    public int ScaleColumns(int value, int weight) => Op(OpKind.ScaleColumns, graph[value].Columns, value, weight);

    public int Relu(int value) => Op(OpKind.Relu, graph[value].Columns, value);

    public int Silu(int value) => Op(OpKind.Silu, graph[value].Columns, value);

    /// <summary>The whole network; returns f.</summary>
    public int Build() => network.Build(this);

    private int Op(OpKind op, int columns, int value, int weight = -1, bool scaled = false)
    {
        int result = graph.Value($"{name}.{++_steps}", ValueKind.Activation, columns);
        int[] inputs = weight < 0
            ? [value]
            : [value, graph.Weight($"{weightPrefix}.{_weights[weight].Name}", _weights[weight].Wide, trainable: true)];
        graph.Node(
            new GraphNode(0, op, [], [], 0, site) { BypassWeight = weight, Scaled = scaled }, op, inputs, [result]);
        return result;
    }
}
