using FlexLLM.Backends;

namespace FlexLLM.Execution;

/// <summary>The slots of a program as tensors of a fixed number of rows.</summary>
internal sealed class Workspace : IDisposable
{
    private readonly DeviceTensor[] _slots;

    public Workspace(IComputeBackend backend, IReadOnlyList<int> columns, int rowsMax)
    {
        RowsMax = rowsMax;
        _slots = [.. columns.Select(c => backend.Allocate(rowsMax, c))];
    }

    public int RowsMax { get; }

    public long Bytes => _slots.Sum(s => s.Bytes);

    public TensorSlice Rows(int slot, int start, int count) => _slots[slot].Slice(start, count);

    public void Dispose()
    {
        foreach (DeviceTensor slot in _slots)
        {
            slot.Dispose();
        }
    }
}
