namespace FlexLLM.Formats;

/// <summary>Element types of safetensors that this library can measure. Only some of them can be weights.</summary>
internal enum StoredType
{
    Bool,
    U8,
    I8,
    F8E4M3,
    F8E5M2,
    F8E8M0,
    F8E4M3Fnuz,
    F8E5M2Fnuz,
    U16,
    I16,
    F16,
    BF16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
}

/// <summary>Names and sizes of <see cref="StoredType"/>.</summary>
internal static class StoredTypes
{
    // In the order of the enum.
    private static readonly (string Name, int Bytes)[] Table =
    [
        ("BOOL", 1), ("U8", 1), ("I8", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("F8_E4M3FNUZ", 1), ("F8_E5M2FNUZ", 1),
        ("U16", 2), ("I16", 2), ("F16", 2), ("BF16", 2), ("U32", 4), ("I32", 4), ("F32", 4), ("U64", 8), ("I64", 8), ("F64", 8),
    ];

    /// <summary>All names, for error messages.</summary>
    public static string Names { get; } = string.Join(", ", Table.Select(row => row.Name));

    public static string NameOf(StoredType type) => Table[(int)type].Name;

    /// <summary>Bytes of one element.</summary>
    public static int BytesOf(StoredType type) => Table[(int)type].Bytes;

    public static StoredType Of(DType type) => type switch
    {
        DType.F32 => StoredType.F32,
        DType.F16 => StoredType.F16,
        _ => StoredType.BF16,
    };

    public static bool TryParse(string name, out StoredType type)
    {
        int index = Array.FindIndex(Table, row => row.Name == name);
        type = (StoredType)Math.Max(index, 0);
        return index >= 0;
    }

    /// <summary>The weight type, for the three stored types that weights may have.</summary>
    public static bool TryToDType(StoredType stored, out DType type)
    {
        (bool known, type) = stored switch
        {
            StoredType.F32 => (true, DType.F32),
            StoredType.F16 => (true, DType.F16),
            StoredType.BF16 => (true, DType.BF16),
            _ => (false, default),
        };
        return known;
    }
}
