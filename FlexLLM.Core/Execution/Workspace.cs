using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>
/// The arena of a program for a fixed number of rows: one tensor, in which each slot is a matrix at the place that the compiler
/// gave it. Slots whose lifetimes do not overlap share memory.
/// </summary>
internal sealed class Workspace : IDisposable
{
    private readonly IComputeBackend _backend;
    private readonly DeviceTensor[] _slots;
    private readonly ResourceSet _owned = new();
    private float[] _poison = [];

    public Workspace(IComputeBackend backend, ArenaLayout layout, int rowsMax)
        : this(backend, layout, rowsMax, backend.Allocate(rowsMax, layout.Columns, TensorUse.Activation))
    {
        _owned.Add(Arena);
    }

    /// <summary>Slots in memory that somebody else owns and that others may use in between.</summary>
    public Workspace(IComputeBackend backend, ArenaLayout layout, int rowsMax, DeviceTensor arena)
    {
        Check.That((long)rowsMax * layout.Columns <= (long)arena.Rows * arena.Columns);
        _backend = backend;
        RowsMax = rowsMax;
        Arena = arena;
        _slots = [.. layout.Slots.Select(s => backend.View(arena, (long)rowsMax * s.Offset, rowsMax, s.Columns))];
    }

    public int RowsMax { get; }

    public long Bytes => Arena.Bytes;

    private DeviceTensor Arena { get; }

    public TensorSlice Rows(int slot, int start, int count) => _slots[slot].Slice(start, count);

    /// <summary>The first rows of a slot; of one that is split by rows, each rank's share of them.</summary>
    public TensorSlice Rows(BufferRef slot, int count) => Rows(slot.Index, 0, count) with { IsRowSplit = slot.IsRowSplit };

    /// <summary>Fills rows of freed slots with NaN: whoever reads them after all will show it.</summary>
    public void Poison(IReadOnlyList<int> slots, int rows)
    {
        foreach (int slot in slots)
        {
            Poison(_backend, Rows(slot, 0, rows), ref _poison);
        }
    }

    /// <summary>Fills a slice with NaN.</summary>
    public static void Poison(IComputeBackend backend, TensorSlice slice, ref float[] poison)
    {
        int count = slice.Rows * slice.Columns;
        if (poison.Length < count)
        {
            poison = new float[count];
            Array.Fill(poison, float.NaN);
        }

        backend.Upload(poison.AsSpan(0, count), slice);
    }

    public void Dispose() => _owned.Dispose();
}
