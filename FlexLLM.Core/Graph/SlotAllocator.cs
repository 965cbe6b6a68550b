using FlexLLM.Primitives;

namespace FlexLLM.Graph;

/// <summary>Gives values workspace slots by lifetime: a slot is reused once the value in it was read for the last time.</summary>
internal sealed class SlotAllocator
{
    private readonly int[] _lastUse;
    private readonly Dictionary<int, BufferRef> _placeOf = [];
    private readonly Dictionary<int, Stack<int>> _freeByColumns = [];
    private readonly List<int> _columns = [];

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

    public IReadOnlyList<int> Columns => _columns;

    public BufferRef this[int value] => _placeOf[value];

    /// <summary>True when no node after <paramref name="node"/> reads the value.</summary>
    public bool DiesAt(int value, int node) => _lastUse[value] <= node;

    public bool IsRead(int value) => _lastUse[value] >= 0;

    /// <summary>A slot of that width for a new value.</summary>
    public BufferRef Take(int value, int columns)
    {
        if (_freeByColumns.TryGetValue(columns, out Stack<int>? free) && free.TryPop(out int slot))
        {
            return _placeOf[value] = BufferRef.Slot(slot);
        }

        _columns.Add(columns);
        return _placeOf[value] = BufferRef.Slot(_columns.Count - 1);
    }

    /// <summary>The value lives in a buffer that another value held or that is no slot.</summary>
    public BufferRef Place(int value, BufferRef place) => _placeOf[value] = place;

    /// <summary>Takes over the buffer of a value that dies here, if it does.</summary>
    public bool TryInherit(int value, int from, int node)
    {
        if (!DiesAt(from, node) || _placeOf[from].Kind == BufferKind.Saved)
        {
            return false;
        }

        _placeOf[value] = _placeOf[from];
        return true;
    }

    /// <summary>Frees the slots of this node's inputs that die here and that no output took over.</summary>
    public void Release(GraphNode node, int index)
    {
        foreach (int input in node.Inputs.Distinct())
        {
            if (_placeOf.TryGetValue(input, out BufferRef place) && place.Kind == BufferKind.Slot && DiesAt(input, index) &&
                !node.Outputs.Any(o => _placeOf.TryGetValue(o, out BufferRef taken) && taken == place))
            {
                Check.That(place.Index < _columns.Count);
                Free(place.Index);
            }
        }
    }

    private void Free(int slot)
    {
        if (!_freeByColumns.TryGetValue(_columns[slot], out Stack<int>? free))
        {
            _freeByColumns.Add(_columns[slot], free = new Stack<int>());
        }

        Check.That(!free.Contains(slot));
        free.Push(slot);
    }
}
