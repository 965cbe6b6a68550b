namespace FlexLLM.Primitives;

/// <summary>FNV-1a over integers: the same on every machine and in every process, which HashCode does not promise.</summary>
internal struct StableHash
{
    private const ulong Offset = 0xCBF29CE484222325;
    private const ulong Prime = 0x100000001B3;

    private ulong _state;

    /// <summary>Hash of everything added so far.</summary>
    public readonly ulong Value => _state ^ Offset;

    /// <summary>Adds the length and the values.</summary>
    public void Add(ReadOnlySpan<int> values)
    {
        Add(values.Length);
        foreach (int value in values)
        {
            Add(value);
        }
    }

    private void Add(int value) => _state = ((_state ^ Offset ^ (uint)value) * Prime) ^ Offset;
}
