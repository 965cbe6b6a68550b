namespace FlexLLM.Primitives;

/// <summary>How rows of floats are stored in fewer bytes between the forward and the backward pass.</summary>
internal enum PackedFormat
{
    /// <summary>Rounded to bfloat16, two to a 32-bit container: loses 16 bits of each number.</summary>
    BF16,

    /// <summary>One bit each, 1 where the number is positive: all that the gradient of a ReLU reads of its output.</summary>
    SignBits,
}

/// <summary>Sizes of <see cref="PackedFormat"/>.</summary>
internal static class PackedFormats
{
    /// <summary>32-bit containers that a row of so many floats takes.</summary>
    public static int PackedColumns(int columns, PackedFormat format)
    {
        int perContainer = format == PackedFormat.BF16 ? 2 : 32;
        return (columns + perContainer - 1) / perContainer;
    }
}
