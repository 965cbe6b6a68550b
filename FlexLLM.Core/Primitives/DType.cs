namespace FlexLLM;

/// <summary>Element type of stored weights. Arithmetic is F32 whatever the storage.</summary>
public enum DType
{
    /// <summary>IEEE 754 binary32, 4 bytes.</summary>
    F32,

    /// <summary>IEEE 754 binary16, 2 bytes.</summary>
    F16,

    /// <summary>bfloat16: the upper half of a binary32, 2 bytes.</summary>
    BF16,
}

/// <summary>Sizes of <see cref="DType"/>.</summary>
internal static class DTypes
{
    /// <summary>Bytes of one element.</summary>
    public static int BytesOf(DType type) => type == DType.F32 ? 4 : 2;
}
