using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>Rows of one width at a place in an arena: columns [Offset, Offset + Columns) of each of its rows' share.</summary>
internal readonly record struct ArenaSlot(int Offset, int Columns);

/// <summary>
/// Workspace of a program: slots whose lifetimes do not overlap share space. An arena for r rows holds r * Columns floats; a slot
/// is the matrix [r, its columns] from float r * Offset on.
/// </summary>
internal sealed record ArenaLayout(int Columns, IReadOnlyList<ArenaSlot> Slots)
{
    /// <summary>Slots begin at multiples of this, so that their rows may be read by whole cache lines.</summary>
    public const int Alignment = 16;

    /// <summary>Width of a slot with its padding.</summary>
    public static int Padded(int columns) => (columns + Alignment - 1) / Alignment * Alignment;
}

/// <summary>
/// Plans the memory of a program: gives each value a slot in an arena, first fit by offset, for as long as it will be read.
/// </summary>
internal sealed class SlotAllocator
{
    private readonly int[] _lastUse;
    private readonly Dictionary<int, BufferRef> _placeOf = [];
    private readonly List<ArenaSlot> _slots = [];
    private readonly Dictionary<ArenaSlot, int> _indices = [];

    // Free space between slots in use: start and length by start. What lies beyond _columns is free without limit.
    private readonly SortedList<int, int> _free = [];
    private readonly HashSet<int> _inUse = [];
    private int _columns;

    /// <summary>Lifetimes are taken from the nodes in their order.</summary>
    public SlotAllocator(ParallelGraph graph, IReadOnlyList<GraphNode> nodes)
    {
        _lastUse = new int[graph.Values.Count];
        Array.Fill(_lastUse, -1);
        for (int i = 0; i < nodes.Count; i++)
        {
            foreach (int input in nodes[i].Inputs)
            {
                _lastUse[input] = i;
            }
        }
    }

    public ArenaLayout Layout => new(_columns, _slots);

    public BufferRef this[int value] => _placeOf[value];

    /// <summary>True when no node after <paramref name="node"/> reads the value.</summary>
    public bool DiesAt(int value, int node) => _lastUse[value] <= node;

    public bool IsRead(int value) => _lastUse[value] >= 0;

    /// <summary>A slot of that width for a new value.</summary>
    public BufferRef Take(int value, int columns)
    {
        int offset = TakeSpace(ArenaLayout.Padded(columns));
        var slot = new ArenaSlot(offset, columns);
        if (!_indices.TryGetValue(slot, out int index))
        {
            index = _indices[slot] = _slots.Count;
            _slots.Add(slot);
        }

        Check.That(_inUse.Add(index));
        return _placeOf[value] = BufferRef.Slot(index);
    }

    /// <summary>The value lives in a buffer that another value held or that is no slot.</summary>
    public BufferRef Place(int value, BufferRef place) => _placeOf[value] = place;

    /// <summary>Takes over the buffer of a value that dies here, if it does.</summary>
    public bool TryInherit(int value, int from, int node)
    {
        if (!DiesAt(from, node) || _placeOf[from].Kind is BufferKind.Saved or BufferKind.None)
        {
            return false;
        }

        _placeOf[value] = _placeOf[from];
        return true;
    }

    /// <summary>
    /// Frees the slots of this node's inputs that die here and that no output took over, and of outputs that nobody reads; returns
    /// their indices.
    /// </summary>
    public IReadOnlyList<int> Release(GraphNode node, int index)
    {
        List<int> freed = [];
        foreach (int value in node.Inputs.Concat(node.Outputs.Where(o => !IsRead(o))).Distinct())
        {
            bool isSlot = _placeOf.TryGetValue(value, out BufferRef place) && place.Kind == BufferKind.Slot;
            if (isSlot && DiesAt(value, index) && _inUse.Contains(place.Index) &&
                !node.Outputs.Any(o => IsRead(o) && _placeOf.TryGetValue(o, out BufferRef taken) && taken == place))
            {
                Free(place.Index);
                freed.Add(place.Index);
            }
        }

        return freed;
    }

    private int TakeSpace(int columns)
    {
        foreach ((int start, int length) in _free)
        {
            if (length >= columns)
            {
                _free.Remove(start);
                if (length > columns)
                {
                    _free.Add(start + columns, length - columns);
                }

                return start;
            }
        }

        // A gap at the end grows; otherwise the arena does.
        int begin = _columns;
        if (_free.Count > 0 && _free.Keys[^1] + _free.Values[^1] == _columns)
        {
            begin = _free.Keys[^1];
            _free.RemoveAt(_free.Count - 1);
        }

        _columns = begin + columns;
        return begin;
    }

    private void Free(int slot)
    {
        Check.That(_inUse.Remove(slot));
        int start = _slots[slot].Offset;
        int length = ArenaLayout.Padded(_slots[slot].Columns);
        int next = _free.Keys.ToList().FindIndex(key => key > start);
        next = next < 0 ? _free.Count : next;
        if (next < _free.Count && _free.Keys[next] == start + length)
        {
            length += _free.Values[next];
            _free.RemoveAt(next);
        }

        if (next > 0 && _free.Keys[next - 1] + _free.Values[next - 1] == start)
        {
            start = _free.Keys[next - 1];
            length += _free.Values[next - 1];
            _free.RemoveAt(next - 1);
        }

        _free.Add(start, length);
    }
}
