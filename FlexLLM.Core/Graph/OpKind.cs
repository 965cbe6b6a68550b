namespace FlexLLM.Graph;

/// <summary>What a node computes. Forward operations first, each followed by what differentiation makes of it.</summary>
internal enum OpKind
{
    /// <summary>x[row] = table[id of row].</summary>
    Embed,

    /// <summary>Gradient of the embedding table; pruned whenever the table is frozen.</summary>
    EmbedBackward,

    /// <summary>Root-mean-square norm with a gain, over groups of the gain's width.</summary>
    RmsNorm,

    /// <summary>Gradient of the norm's input; reads the forward input.</summary>
    RmsNormBackward,

    /// <summary>Gradient of the norm's gain; pruned whenever the gain is frozen.</summary>
    RmsNormBackwardGain,

    /// <summary>y = x W^T (+ bias).</summary>
    Linear,

    /// <summary>dx = dy W; reads no activation.</summary>
    LinearBackwardInput,

    /// <summary>dW = dy^T x; pruned whenever W is frozen.</summary>
    LinearBackwardWeight,

    /// <summary>Rotary position embedding.</summary>
    Rope,

    /// <summary>The inverse rotation.</summary>
    RopeBackward,

    /// <summary>Causal attention; outputs the heads and the log-sum-exp of each row's scores.</summary>
    Attention,

    /// <summary>Gradients of queries, keys and values; reads q, k, v and the log-sum-exp.</summary>
    AttentionBackward,

    /// <summary>silu(gate) * up.</summary>
    SiluGate,

    /// <summary>Gradients of gate and up; reads both.</summary>
    SiluGateBackward,

    /// <summary>y = a + b; its gradient passes through unchanged.</summary>
    Add,

    /// <summary>Sum of two contributions to one gradient.</summary>
    AddGradient,

    /// <summary>Vocabulary logits of chosen rows, for sampling.</summary>
    Logits,

    /// <summary>Loss of rows with a target, and the gradient of its input at once.</summary>
    CrossEntropy,

    /// <summary>In the graph that serves: whatever network the adapter of a row has at this place.</summary>
    Bypass,

    /// <summary>
    /// u = x M^T with a bypass matrix M [inner, wide]: LoRA's x A^T. Its gradients are a <see cref="Widen"/> and an
    /// <see cref="OuterProduct"/>.
    /// </summary>
    Narrow,

    /// <summary>
    /// y = u M: LoRA's u B^T. Its gradients are a <see cref="Narrow"/> and an <see cref="OuterProduct"/>.
    /// </summary>
    Widen,

    /// <summary>dM = u^T x: gradient of a bypass matrix.</summary>
    OuterProduct,

    /// <summary>y = x + bias, a trainable vector.</summary>
    AddBias,

    /// <summary>Gradient of the bias: sums over rows.</summary>
    AddBiasBackward,

    /// <summary>max(x, 0).</summary>
    Relu,

    /// <summary>dy where the forward output is positive, else 0; a bit of the output is all it reads.</summary>
    ReluBackward,

    /// <summary>x * sigmoid(x).</summary>
    Silu,

    /// <summary>Gradient of <see cref="Silu"/>; reads its input.</summary>
    SiluBackward,

    /// <summary>x * (gain - 1): the (IA)^3 bypass.</summary>
    ScaleColumns,

    /// <summary>Gradients of the gain and of x; reads both.</summary>
    ScaleColumnsBackward,

    /// <summary>A saved value in fewer bytes; the format is the packed value's.</summary>
    Pack,

    /// <summary>The saved value as rows again, in the backward pass.</summary>
    Unpack,

    /// <summary>
    /// Gives a value another layout over the ranks of a group (<see cref="MoveKind"/>); its gradient is another move.
    /// </summary>
    Move,

    /// <summary>
    /// A LoRA network and its add in one: y = base + scale * (x A^T) B^T. Made by <see cref="BypassFusion"/> alone.
    /// </summary>
    Lora,

    /// <summary>
    /// Gradients of A, B and x of a LoRA network, x A^T computed again inside. Made by <see cref="BypassFusion"/> alone.
    /// </summary>
    LoraBackward,
}

/// <summary>What a rank does to give a value another layout: the parallel operators as one rank sees them.</summary>
internal enum MoveKind
{
    /// <summary>Nothing: the rank has what it needs.</summary>
    Pass,

    /// <summary>The sum of all ranks' partials, everywhere.</summary>
    AllReduce,

    /// <summary>All ranks' rows, everywhere.</summary>
    AllGatherRows,

    /// <summary>All ranks' columns, everywhere.</summary>
    AllGatherColumns,

    /// <summary>The rank's rows of the sum of partials.</summary>
    ReduceScatterRows,

    /// <summary>The rank's columns of the sum of partials.</summary>
    ReduceScatterColumns,

    /// <summary>From a share of the rows to a share of the columns.</summary>
    RowsToColumns,

    /// <summary>From a share of the columns to a share of the rows.</summary>
    ColumnsToRows,

    /// <summary>The rank's rows of a whole that it has.</summary>
    TakeRows,

    /// <summary>The rank's columns of a whole that it has.</summary>
    TakeColumns,

    /// <summary>The rank's rows where they belong in a whole, zeros elsewhere: its share of a sum.</summary>
    PlaceRows,

    /// <summary>The rank's columns where they belong in a whole, zeros elsewhere.</summary>
    PlaceColumns,
}
