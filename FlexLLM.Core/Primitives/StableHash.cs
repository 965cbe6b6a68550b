namespace FlexLLM.Primitives;

/// <summary>FNV-1a: the same on every machine and in every process, which neither HashCode nor string.GetHashCode promises.</summary>
internal struct StableHash()
{
    private const ulong Prime = 0x100000001B3;

    /// <summary>Hash of everything added so far.</summary>
    public ulong Value { get; private set; } = 0xCBF29CE484222325;

    /// <summary>Adds the length and the values.</summary>
    public void Add(ReadOnlySpan<int> values)
    {
        Add((uint)values.Length);
        foreach (int value in values)
        {
            Add((uint)value);
        }
    }

    /// <summary>The hash of one row of bytes.</summary>
    public static ulong Of(ReadOnlySpan<byte> bytes)
    {
        var hash = new StableHash();
        foreach (byte b in bytes)
        {
            hash.Add(b);
        }

        return hash.Value;
    }

    private void Add(uint value) => Value = (Value ^ value) * Prime;
}
