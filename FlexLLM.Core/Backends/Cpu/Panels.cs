using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>How a panel row of 16 numbers lies in memory.</summary>
internal unsafe interface IPanel
{
    static abstract int RowBytes { get; }

    /// <summary>Numbers 0..7, widened.</summary>
    static abstract Vector256<float> Low(byte* row);

    /// <summary>Numbers 8..15, widened.</summary>
    static abstract Vector256<float> High(byte* row);

    static abstract float Read(byte* row, int lane);

    static abstract void Write(byte* row, int lane, float value);

    /// <summary>Writes eight panel rows: number i of row c is columns[8 i + c]. Columns are scratch.</summary>
    static abstract void WriteEight(byte* row, float* columns);
}

/// <summary>16 floats in order.</summary>
internal readonly unsafe struct F32Panel : IPanel
{
    public static int RowBytes => 64;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Low(byte* row) => Vector256.Load((float*)row);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> High(byte* row) => Vector256.Load((float*)(row + 32));

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Read(byte* row, int lane) => ((float*)row)[lane];

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Write(byte* row, int lane, float value) => ((float*)row)[lane] = value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void WriteEight(byte* row, float* columns)
    {
        Transpose.Eight(columns, (float*)row, PanelPacking.Width);
        Transpose.Eight(columns + 64, (float*)row + 8, PanelPacking.Width);
    }
}

/// <summary>Eight 32-bit words: word i holds number i in its low and number i + 8 in its high half, so that one shift and one
/// mask widen all sixteen.</summary>
internal readonly unsafe struct BF16Panel : IPanel
{
    public static int RowBytes => 32;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Low(byte* row) => Vector256.ShiftLeft(Vector256.Load((uint*)row), 16).AsSingle();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> High(byte* row) =>
        (Vector256.Load((uint*)row) & Vector256.Create(0xFFFF0000u)).AsSingle();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Read(byte* row, int lane) => BitConverter.UInt32BitsToSingle((uint)((ushort*)row)[Slot(lane)] << 16);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Write(byte* row, int lane, float value) => ((ushort*)row)[Slot(lane)] = Round(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void WriteEight(byte* row, float* columns)
    {
        for (int i = 0; i < 64; i += 8)
        {
            Join(Vector256.Load(columns + i), Vector256.Load(columns + 64 + i)).Store(columns + i);
        }

        Transpose.Eight(columns, (float*)row, 8);
    }

    /// <summary>Eight words of two rounded numbers each: one of low in the low half, one of high in the high half.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Join(Vector256<float> low, Vector256<float> high) =>
        (Vector256.ShiftRightLogical(RoundWords(low), 16) | (RoundWords(high) & Vector256.Create(0xFFFF0000u))).AsSingle();

    /// <summary>Nearest bfloat16, ties to even; NaN stays NaN.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ushort Round(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return (bits & 0x7FFFFFFF) > 0x7F800000
            ? (ushort)((bits >> 16) | 0x40)
            : (ushort)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }

    // Round's result in the upper half of each word; the lower half is undefined.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<uint> RoundWords(Vector256<float> values)
    {
        Vector256<uint> bits = values.AsUInt32();
        Vector256<uint> odd = Vector256.ShiftRightLogical(bits, 16) & Vector256<uint>.One;
        Vector256<uint> rounded = bits + odd + Vector256.Create(0x7FFFu);
        Vector256<uint> numbers = Vector256.Equals(values, values).AsUInt32();
        return Vector256.ConditionalSelect(numbers, rounded, bits | Vector256.Create(0x400000u));
    }

    private static int Slot(int lane) => (2 * (lane & 7)) + (lane >> 3);
}

/// <summary>Packs W [out, in] into panels [ceil(out / 16)][in][16]; rows past the last output are zeros.</summary>
internal static unsafe class PanelPacking
{
    /// <summary>Outputs in a panel.</summary>
    public const int Width = 16;

    public static int Count(int outFeatures) => (outFeatures + Width - 1) / Width;

    /// <summary>Columns of the last panel that exist, 1..16.</summary>
    public static int LastColumns(int columns) => columns - ((Count(columns) - 1) * Width);

    /// <summary>Packs all of source into destination, which holds <see cref="Count"/> panels.</summary>
    public static void Pack<TPanel>(ThreadTeam team, in HostMatrix source, byte* destination)
        where TPanel : unmanaged, IPanel
    {
        int panels = Count(source.Rows);
        long work = (long)source.Rows * source.Columns;
        switch (source.Type)
        {
            case DType.F32:
                team.Run(new PackJob<TPanel, F32Source>(source, destination), panels, work);
                break;
            case DType.F16:
                team.Run(new PackJob<TPanel, F16Source>(source, destination), panels, work);
                break;
            default:
                team.Run(new PackJob<TPanel, BF16Source>(source, destination), panels, work);
                break;
        }
    }

    private interface ISource
    {
        static abstract float Read(byte* data, long index);

        static abstract Vector256<float> ReadEight(byte* data, long index);
    }

    private readonly struct F32Source : ISource
    {
        public static float Read(byte* data, long index) => ((float*)data)[index];

        public static Vector256<float> ReadEight(byte* data, long index) => Vector256.Load((float*)data + index);
    }

    private readonly struct F16Source : ISource
    {
        public static float Read(byte* data, long index) => (float)((Half*)data)[index];

        public static Vector256<float> ReadEight(byte* data, long index)
        {
            Half* h = (Half*)data + index;
            return Vector256.Create(
                (float)h[0], (float)h[1], (float)h[2], (float)h[3], (float)h[4], (float)h[5], (float)h[6], (float)h[7]);
        }
    }

    private readonly struct BF16Source : ISource
    {
        public static float Read(byte* data, long index) => BitConverter.UInt32BitsToSingle((uint)((ushort*)data)[index] << 16);

        public static Vector256<float> ReadEight(byte* data, long index)
        {
            (Vector128<uint> low, Vector128<uint> high) = Vector128.Widen(Vector128.Load((ushort*)data + index));
            return Vector256.ShiftLeft(Vector256.Create(low, high), 16).AsSingle();
        }
    }

    // One item: one panel.
    private readonly struct PackJob<TPanel, TSource>(in HostMatrix source, byte* destination) : IParallelJob
        where TPanel : unmanaged, IPanel
        where TSource : unmanaged, ISource
    {
        private readonly byte* _source = source.Data;
        private readonly int _rows = source.Rows;
        private readonly int _columns = source.Columns;
        private readonly byte* _destination = destination;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            byte* panel = _destination + ((long)item * _columns * TPanel.RowBytes);
            long first = (long)item * Width * _columns;
            int rows = Math.Min(Width, _rows - (item * Width));
            float* block = stackalloc float[8 * Width];
            int c = 0;
            for (; c + 8 <= _columns; c += 8)
            {
                for (int i = 0; i < Width; i++)
                {
                    Vector256<float> eight = i < rows ? TSource.ReadEight(_source, first + ((long)i * _columns) + c) : default;
                    eight.Store(block + (8 * i));
                }

                TPanel.WriteEight(panel + ((long)c * TPanel.RowBytes), block);
            }

            for (; c < _columns; c++)
            {
                for (int i = 0; i < Width; i++)
                {
                    float value = i < rows ? TSource.Read(_source, first + ((long)i * _columns) + c) : 0f;
                    TPanel.Write(panel + ((long)c * TPanel.RowBytes), i, value);
                }
            }
        }
    }
}
