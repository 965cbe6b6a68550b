namespace FlexLLM.Primitives;

/// <summary>
/// A row-major matrix in host memory that somebody else owns (a memory-mapped file, a pinned array). Valid only for the
/// call that receives it.
/// </summary>
internal readonly unsafe struct HostMatrix(byte* data, DType type, int rows, int columns)
{
    public byte* Data { get; } = data;

    public DType Type { get; } = type;

    public int Rows { get; } = rows;

    public int Columns { get; } = columns;

    /// <summary>Bytes from the first element to the end of the last.</summary>
    public long Bytes => (long)Rows * Columns * DTypes.BytesOf(Type);

    /// <summary>Element (row, column), widened to F32 exactly.</summary>
    public float this[int row, int column]
    {
        get
        {
            long index = ((long)row * Columns) + column;
            return Type switch
            {
                DType.F32 => ((float*)Data)[index],
                DType.F16 => (float)((Half*)Data)[index],
                _ => BitConverter.UInt32BitsToSingle((uint)((ushort*)Data)[index] << 16),
            };
        }
    }
}
