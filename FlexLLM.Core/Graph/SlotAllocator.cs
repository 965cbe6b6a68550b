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
    private readonly ParallelGraph _graph;
    private readonly int[] _lastUse;
    private readonly Dictionary<int, BufferRef> _placeOf = [];
    private readonly List<ArenaSlot> _slots = [];
    private readonly Dictionary<ArenaSlot, int> _indices = [];

    // Free space between slots in use: start and length by start. What lies beyond _columns is free without limit.
    private readonly SortedList<int, int> _free = [];

    // Values that live or lived in each slot in use: several where one took it over or is another name of it.
    private readonly Dictionary<int, List<int>> _inUse = [];
    private int _columns;

    /// <summary>Lifetimes are taken from the nodes in their order.</summary>
    public SlotAllocator(ParallelGraph graph, IReadOnlyList<GraphNode> nodes)
    {
        _graph = graph;
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

        _inUse.Add(index, [value]);
        return _placeOf[value] = BufferRef.Slot(index, _graph.Values[value].IsRowSplit);
    }

    /// <summary>The value lives in a buffer that another value held or that is no slot.</summary>
    public BufferRef Place(int value, BufferRef place)
    {
        if (place.Kind == BufferKind.Slot)
        {
            _inUse[place.Index].Add(value);
        }

        return _placeOf[value] = place;
    }

    /// <summary>Takes over the buffer of a value if all that is in it dies here.</summary>
    public bool TryInherit(int value, int from, int node)
    {
        BufferRef place = _placeOf[from];
        if (!DiesAt(from, node) || place.Kind is BufferKind.Saved or BufferKind.None ||
            (place.Kind == BufferKind.Slot && !IsDead(place, node)))
        {
            return false;
        }

        Place(value, place);
        return true;
    }

    /// <summary>
    /// Frees the slots of this node's values in which nothing is left that is read later; returns their indices.
    /// </summary>
    public IReadOnlyList<int> Release(GraphNode node, int index)
    {
        List<int> freed = [];
        foreach (int value in node.Inputs.Concat(node.Outputs))
        {
            if (_placeOf.TryGetValue(value, out BufferRef place) && place.Kind == BufferKind.Slot && _inUse.ContainsKey(place.Index) &&
                IsDead(place, index))
            {
                Free(place.Index);
                freed.Add(place.Index);
            }
        }

        return freed;
    }

    private bool IsDead(BufferRef slot, int node) => _inUse[slot.Index].TrueForAll(value => DiesAt(value, node));

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
        int next = 0;
        while (next < _free.Count && _free.Keys[next] < start)
        {
            next++;
        }

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
