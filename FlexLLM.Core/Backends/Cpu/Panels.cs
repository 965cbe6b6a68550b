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

    /// <summary>Nearest bfloat16, ties to even; NaN stays NaN.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ushort Round(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return (bits & 0x7FFFFFFF) > 0x7F800000
            ? (ushort)((bits >> 16) | 0x40)
            : (ushort)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }

    private static int Slot(int lane) => (2 * (lane & 7)) + (lane >> 3);
}

/// <summary>Packs W [out, in] into panels [ceil(out / 16)][in][16]; rows past the last output are zeros.</summary>
internal static unsafe class PanelPacking
{
    /// <summary>Outputs in a panel.</summary>
    public const int Width = 16;

    // Columns that stay in the first-level cache while the panel's 16 source rows pass.
    private const int ColumnsPerPass = 256;

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
    }

    private readonly struct F32Source : ISource
    {
        public static float Read(byte* data, long index) => ((float*)data)[index];
    }

    private readonly struct F16Source : ISource
    {
        public static float Read(byte* data, long index) => (float)((Half*)data)[index];
    }

    private readonly struct BF16Source : ISource
    {
        public static float Read(byte* data, long index) => BitConverter.UInt32BitsToSingle((uint)((ushort*)data)[index] << 16);
    }

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
            for (int start = 0; start < _columns; start += ColumnsPerPass)
            {
                int end = Math.Min(_columns, start + ColumnsPerPass);
                for (int lane = 0; lane < Width; lane++)
                {
                    int row = (item * Width) + lane;
                    for (int c = start; c < end; c++)
                    {
                        float value = row < _rows ? TSource.Read(_source, ((long)row * _columns) + c) : 0f;
                        TPanel.Write(panel + ((long)c * TPanel.RowBytes), lane, value);
                    }
                }
            }
        }
    }
}
