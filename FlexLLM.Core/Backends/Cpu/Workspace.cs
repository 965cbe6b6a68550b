using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>What a workspace buffer is for. Buffers in use at the same time have different slots.</summary>
internal enum WorkspaceSlot
{
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

/// <summary>
/// Scratch memory by slot. Until <see cref="Reserve"/> is called it grows on demand and stays; from then on it has the sizes
/// that were reserved, and an operation that asks for more breaks an invariant.
/// </summary>
internal sealed unsafe class Workspace(MemoryCounter counter) : IDisposable
{
    public static readonly int SlotCount = Enum.GetValues<WorkspaceSlot>().Length;

    private readonly NativeBuffer?[] _buffers = new NativeBuffer?[SlotCount];
    private bool _isReserved;

    /// <summary>Bytes that reserving so much in each slot takes: whole pages.</summary>
    public static long BytesFor(ReadOnlySpan<long> bytesBySlot)
    {
        long sum = 0;
        foreach (long bytes in bytesBySlot)
        {
            sum += Padded(bytes);
        }

        return sum;
    }

    /// <summary>Gives each slot exactly its size, larger or smaller than now. Where memory runs out, nothing is smaller.</summary>
    public void Reserve(ReadOnlySpan<long> bytesBySlot)
    {
        Check.That(bytesBySlot.Length == SlotCount);
        for (int pass = 0; pass < 2; pass++)
        {
            for (int slot = 0; slot < SlotCount; slot++)
            {
                long bytes = Padded(bytesBySlot[slot]);
                long held = _buffers[slot]?.Bytes ?? 0;
                if (pass == 0 ? bytes > held : bytes < held)
                {
                    NativeBuffer? next = bytes == 0 ? null : new NativeBuffer(counter, bytes, zeroed: false);
                    _buffers[slot]?.Dispose();
                    _buffers[slot] = next;
                }
            }
        }

        _isReserved = true;
    }

    /// <summary>At least <paramref name="bytes"/> undefined bytes, valid until the slot is asked for again.</summary>
    public byte* Bytes(WorkspaceSlot slot, long bytes)
    {
        if (bytes == 0)
        {
            return null;
        }

        ref NativeBuffer? buffer = ref _buffers[(int)slot];
        if (buffer is null || buffer.Bytes < bytes)
        {
            Check.That(!_isReserved, "calls stay within the limits that scratch was reserved for");
            buffer?.Dispose();
            buffer = null;
            buffer = new NativeBuffer(counter, Padded(bytes), zeroed: false);
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

    private static long Padded(long bytes) => (bytes + 4095) & ~4095L;
}
