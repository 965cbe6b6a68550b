using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>The slots of a program as tensors of a fixed number of rows.</summary>
internal sealed class Workspace : IDisposable
{
    private readonly DeviceTensor[] _slots;
    private readonly ResourceSet _owned = new();

    public Workspace(IComputeBackend backend, IReadOnlyList<int> columns, int rowsMax)
    {
        RowsMax = rowsMax;
        try
        {
            _slots = [.. columns.Select(c => _owned.Add(backend.Allocate(rowsMax, c)))];
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public int RowsMax { get; }

    public long Bytes => _slots.Sum(s => s.Bytes);

    public TensorSlice Rows(int slot, int start, int count) => _slots[slot].Slice(start, count);

    public void Dispose() => _owned.Dispose();
}
