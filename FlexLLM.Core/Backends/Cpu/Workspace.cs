namespace FlexLLM.Backends.Cpu;

/// <summary>What a workspace buffer is for. Buffers in use at the same time have different slots.</summary>
internal enum WorkspaceSlot
{
    PackedRows,
    TransposedWeight,
    LowRank,
    LoraPieces,
    FactorRows,
    FactorTiles,
    SelectedRows,
    SelectedGradients,
    Logits,
    RowLosses,
    AttentionSegments,
    BlockTables,
    AttentionScratch,
    AttentionHead,
    AttentionChunk,
}

/// <summary>Scratch memory that grows on demand and stays: a steady load allocates nothing.</summary>
internal sealed unsafe class Workspace(MemoryCounter counter) : IDisposable
{
    private readonly NativeBuffer?[] _buffers = new NativeBuffer?[Enum.GetValues<WorkspaceSlot>().Length];

    /// <summary>At least <paramref name="bytes"/> undefined bytes, valid until the slot is asked for again.</summary>
    public byte* Bytes(WorkspaceSlot slot, long bytes)
    {
        ref NativeBuffer? buffer = ref _buffers[(int)slot];
        if (buffer is null || buffer.Bytes < bytes)
        {
            buffer?.Dispose();
            buffer = null;
            buffer = new NativeBuffer(counter, (bytes + 4095) & ~4095L, zeroed: false);
        }

        return buffer.Data;
    }

    /// <summary>At least <paramref name="count"/> floats; see <see cref="Bytes"/>.</summary>
    public float* Floats(WorkspaceSlot slot, long count) => (float*)Bytes(slot, count * sizeof(float));

    public void Dispose()
    {
        foreach (NativeBuffer? buffer in _buffers)
        {
            buffer?.Dispose();
        }
    }
}
