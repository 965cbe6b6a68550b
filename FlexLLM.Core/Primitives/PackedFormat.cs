namespace FlexLLM.Primitives;

/// <summary>What a packed row keeps of each element.</summary>
internal enum PackedFormat
{
    /// <summary>The nearest bfloat16, ties to even; NaN stays NaN. Two in a float.</summary>
    BF16,

    /// <summary>Whether the element is above zero; unpacks to 1 or 0. Thirty-two in a float.</summary>
    SignBits,
}

/// <summary>Sizes of packed rows.</summary>
internal static class PackedFormats
{
    /// <summary>Floats that hold a packed row of so many columns.</summary>
    public static int PackedColumns(int columns, PackedFormat format)
    {
        int perFloat = format switch
        {
            PackedFormat.BF16 => 2,
            PackedFormat.SignBits => 32,
            _ => throw new ArgumentOutOfRangeException(nameof(format), format, "Not a packed format."),
        };
        return (columns / perFloat) + (columns % perFloat == 0 ? 0 : 1);
    }
}
