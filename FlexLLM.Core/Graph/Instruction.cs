using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>Where an instruction finds or leaves rows.</summary>
internal enum BufferKind
{
    /// <summary>No buffer: an output that nobody reads.</summary>
    None,

    /// <summary>Workspace slot; row i belongs to row i of the batch or window.</summary>
    Slot,

    /// <summary>Value saved from forward to backward, at the sample's absolute positions.</summary>
    Saved,

    /// <summary>Gradient of the value between two layers, at absolute positions; each layer replaces it in place.</summary>
    Boundary,

    /// <summary>Key-gradient accumulator of the layer in progress, at absolute positions.</summary>
    KeyGradient,

    /// <summary>Value-gradient accumulator of the layer in progress, at absolute positions.</summary>
    ValueGradient,

    /// <summary>The value that a bypass program reads.</summary>
    Tap,

    /// <summary>The value that a bypass program adds to.</summary>
    Sum,
}

/// <summary>A buffer by kind and index (of the slot or the saved value); a rank may have a share of the rows in it only.</summary>
internal readonly record struct BufferRef(BufferKind Kind, int Index = 0, bool IsRowSplit = false)
{
    public static BufferRef None => new(BufferKind.None, -1);

    public static BufferRef Slot(int index, bool isRowSplit = false) => new(BufferKind.Slot, index, isRowSplit);

    public static BufferRef Saved(int index) => new(BufferKind.Saved, index);
}

/// <summary>
/// One call of the backend. Inputs and outputs keep the places of <see cref="OpSignatures"/> without the weights, which are
/// indices into the program's weight names.
/// </summary>
internal sealed record Instruction(OpKind Op, int Layer, BufferRef[] Inputs, BufferRef[] Outputs)
{
    /// <summary>Index of a backbone weight; of a bypass operation, of the weight in its site's network.</summary>
    public int Weight { get; init; } = -1;

    public int Bias { get; init; } = -1;

    /// <summary>Adapter site of a bypass: layer * sites per layer + module.</summary>
    public int Site { get; init; } = -1;

    /// <summary>The output is added to instead of written.</summary>
    public bool Accumulate { get; init; }

    /// <summary>The result is multiplied by the adapter's scale.</summary>
    public bool Scaled { get; init; }

    /// <summary>Of a <see cref="OpKind.Bypass"/>: which networks run here.</summary>
    public BypassAttachment Attachment { get; init; }

    /// <summary>Of a <see cref="OpKind.Move"/>: what happens to the value.</summary>
    public MoveKind Move { get; init; }

    /// <summary>Of an <see cref="OpKind.AddBias"/>: the other ranks leave it out.</summary>
    public bool OnRankZeroOnly { get; init; }

    /// <summary>How <see cref="OpKind.Unpack"/> reads its input.</summary>
    public PackedFormat? Packed { get; init; }

    /// <summary>Slots whose last reader this was: their space is somebody else's from here on.</summary>
    public IReadOnlyList<int> Frees { get; init; } = [];
}

/// <summary>Names of weights by index, shared by all programs of a model.</summary>
internal sealed class WeightTable
{
    private readonly Dictionary<string, int> _indices = [];
    private readonly List<string> _names = [];

    public IReadOnlyList<string> Names => _names;

    public int IndexOf(string name)
    {
        if (!_indices.TryGetValue(name, out int index))
        {
            index = _names.Count;
            _indices.Add(name, index);
            _names.Add(name);
        }

        return index;
    }
}

/// <summary>Instruction after which a value stands in a slot.</summary>
internal readonly record struct ValuePlace(int Instruction, int Slot);

/// <summary>
/// The forward pass of a batch that mixes inference rows and finetuning windows of any adapters: embedding, layers and final
/// norm for all rows; logits for the rows to be sampled; loss and its gradient for the finetuning rows.
/// </summary>
internal sealed class ForwardProgram
{
    /// <summary>Embedding to final norm, for every row of the batch.</summary>
    public required IReadOnlyList<Instruction> Body { get; init; }

    /// <summary>Multiplies chosen rows with the head.</summary>
    public required Instruction Logits { get; init; }

    /// <summary>Loss and gradient down to the last layer's output, for the rows of finetuning windows.</summary>
    public required IReadOnlyList<Instruction> Loss { get; init; }

    /// <summary>Workspace of the rows of a batch.</summary>
    public required ArenaLayout Arena { get; init; }

    /// <summary>Where each activation can be captured for the backward pass.</summary>
    public required IReadOnlyDictionary<string, ValuePlace> Places { get; init; }
}

/// <summary>A forward value that a job keeps for its backward pass.</summary>
/// <param name="Name">Name of the value in the graph.</param>
/// <param name="Layer">Decoder layer.</param>
/// <param name="Columns">Floats per token, or 32-bit containers where packed.</param>
/// <param name="ByAttention">True for the log-sum-exp, which the attention operation stores itself.</param>
/// <param name="Packed">How rows are packed; null for plain floats.</param>
internal sealed record SavedValue(string Name, int Layer, int Columns, bool ByAttention, PackedFormat? Packed = null)
{
    /// <summary>The name without its layer: what reports sum over layers by.</summary>
    public string Role => PassReport.RoleOf(Name);
}

/// <summary>After this instruction of the forward body, copy the window's rows of a slot into a saved value.</summary>
internal readonly record struct Capture(int Instruction, int Slot, int Saved);

/// <summary>
/// What one set of trainable bypasses adds to the forward program: what to save, and the backward pass by layer.
/// </summary>
internal sealed class TrainingProgram
{
    /// <summary>Values kept from forward to backward; keys and values live in the job's KV cache besides.</summary>
    public required IReadOnlyList<SavedValue> Saved { get; init; }

    /// <summary>Captures in the order of the forward body.</summary>
    public required IReadOnlyList<Capture> Captures { get; init; }

    /// <summary>Index of the first capture at or after an instruction.</summary>
    public int FirstCaptureAt(int instruction)
    {
        int low = 0;
        int high = Captures.Count;
        while (low < high)
        {
            int middle = (low + high) / 2;
            (low, high) = Captures[middle].Instruction < instruction ? (middle + 1, high) : (low, middle);
        }

        return low;
    }

    /// <summary>Backward instructions of each layer; empty below <see cref="LowestLayer"/>.</summary>
    public required IReadOnlyList<IReadOnlyList<Instruction>> Layers { get; init; }

    /// <summary>The layer of the lowest bypass: backward ends there.</summary>
    public required int LowestLayer { get; init; }

    /// <summary>Workspace of the rows of a backward window.</summary>
    public required ArenaLayout Arena { get; init; }

    /// <summary>Sites of the trainable bypasses, ascending.</summary>
    public required IReadOnlyList<int> Sites { get; init; }

    /// <summary>Floats saved per token over all layers, keys and values not counted.</summary>
    public long SavedColumns => Saved.Sum(s => (long)s.Columns);

    /// <summary>The graph that this program was lowered from, for reports.</summary>
    public required ParallelGraph Graph { get; init; }
}

/// <summary>
/// A network as it runs over rows of one adapter while serving: reads X, ends with the add. <see cref="BufferKind.Tap"/> is X,
/// <see cref="BufferKind.Sum"/> the value that it is added to.
/// </summary>
internal sealed class BypassProgram
{
    public required IReadOnlyList<Instruction> Steps { get; init; }

    public required ArenaLayout Arena { get; init; }
}
