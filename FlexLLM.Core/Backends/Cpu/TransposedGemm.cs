using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace FlexLLM.Backends.Cpu;

/// <summary>
/// C (+)= A W for a packed weight W [outputs, inputs] that is read as it lies, 16 outputs beside each other, though it is the
/// outputs that are summed over. Lane l of a vector sums over the outputs l, 8 + l, 16 + l ..; one fixed tree then joins the lanes.
/// A(i, 16 p + l) is at A + i ARow + 16 p + l (floats), panel p's row of input column k at B + p BPanel + k RowBytes (bytes),
/// C(i, k) at C + i CRow + k.
/// </summary>
internal unsafe struct TransposedGemm
{
    public float* A;
    public nint ARow;
    public byte* B;
    public nint BPanel;
    public float* C;
    public nint CRow;

    /// <summary>Length of the reduction in panels of 16.</summary>
    public int Panels;

    /// <summary>Adds to what C holds.</summary>
    public bool Accumulate;

    /// <summary>
    /// All of it for rows x columns, on the calling thread. Columns outside, so that a weight comes from memory once, and while
    /// rows are computed.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public readonly void Multiply<TPanel>(int rows, int columns)
        where TPanel : unmanaged, IPanel
    {
        int k = 0;
        for (; k + 4 <= columns; k += 4)
        {
            byte* b = B + (k * TPanel.RowBytes);
            int i = 0;
            for (; i + 3 <= rows && rows - i != 4; i += 3)
            {
                Tile3x4<TPanel>(i, b, k);
            }

            for (; i + 2 <= rows; i += 2)
            {
                Tile2x4<TPanel>(i, b, k);
            }

            if (i < rows)
            {
                Tile1x4<TPanel>(i, b, k);
            }
        }

        for (; k < columns; k++)
        {
            for (int i = 0; i < rows; i++)
            {
                Tile1x1<TPanel>(i, B + (k * TPanel.RowBytes), k);
            }
        }
    }

    // Twelve chains: a vector of A for each row, one of B at a time.
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private readonly void Tile3x4<TPanel>(int row, byte* b, int column)
        where TPanel : unmanaged, IPanel
    {
        Vector256<float> c00 = default, c01 = default, c02 = default, c03 = default;
        Vector256<float> c10 = default, c11 = default, c12 = default, c13 = default;
        Vector256<float> c20 = default, c21 = default, c22 = default, c23 = default;
        float* a = A + (row * ARow);
        float* a1 = a + ARow;
        float* a2 = a1 + ARow;
        nint bPanel = BPanel;
        nint p = 0;
        for (int n = Panels; n > 0; n--)
        {
            Prefetch<TPanel>(b);
            Vector256<float> x = Vector256.Load(a + p);
            Vector256<float> y = Vector256.Load(a1 + p);
            Vector256<float> z = Vector256.Load(a2 + p);
            Vector256<float> w = TPanel.Low(b);
            c00 = Vector256.FusedMultiplyAdd(x, w, c00);
            c10 = Vector256.FusedMultiplyAdd(y, w, c10);
            c20 = Vector256.FusedMultiplyAdd(z, w, c20);
            w = TPanel.Low(b + TPanel.RowBytes);
            c01 = Vector256.FusedMultiplyAdd(x, w, c01);
            c11 = Vector256.FusedMultiplyAdd(y, w, c11);
            c21 = Vector256.FusedMultiplyAdd(z, w, c21);
            w = TPanel.Low(b + (2 * TPanel.RowBytes));
            c02 = Vector256.FusedMultiplyAdd(x, w, c02);
            c12 = Vector256.FusedMultiplyAdd(y, w, c12);
            c22 = Vector256.FusedMultiplyAdd(z, w, c22);
            w = TPanel.Low(b + (3 * TPanel.RowBytes));
            c03 = Vector256.FusedMultiplyAdd(x, w, c03);
            c13 = Vector256.FusedMultiplyAdd(y, w, c13);
            c23 = Vector256.FusedMultiplyAdd(z, w, c23);
            x = Vector256.Load(a + p + 8);
            y = Vector256.Load(a1 + p + 8);
            z = Vector256.Load(a2 + p + 8);
            w = TPanel.High(b);
            c00 = Vector256.FusedMultiplyAdd(x, w, c00);
            c10 = Vector256.FusedMultiplyAdd(y, w, c10);
            c20 = Vector256.FusedMultiplyAdd(z, w, c20);
            w = TPanel.High(b + TPanel.RowBytes);
            c01 = Vector256.FusedMultiplyAdd(x, w, c01);
            c11 = Vector256.FusedMultiplyAdd(y, w, c11);
            c21 = Vector256.FusedMultiplyAdd(z, w, c21);
            w = TPanel.High(b + (2 * TPanel.RowBytes));
            c02 = Vector256.FusedMultiplyAdd(x, w, c02);
            c12 = Vector256.FusedMultiplyAdd(y, w, c12);
            c22 = Vector256.FusedMultiplyAdd(z, w, c22);
            w = TPanel.High(b + (3 * TPanel.RowBytes));
            c03 = Vector256.FusedMultiplyAdd(x, w, c03);
            c13 = Vector256.FusedMultiplyAdd(y, w, c13);
            c23 = Vector256.FusedMultiplyAdd(z, w, c23);
            p += PanelPacking.Width;
            b += bPanel;
        }

        Store(row, column, c00, c01, c02, c03);
        Store(row + 1, column, c10, c11, c12, c13);
        Store(row + 2, column, c20, c21, c22, c23);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private readonly void Tile2x4<TPanel>(int row, byte* b, int column)
        where TPanel : unmanaged, IPanel
    {
        Vector256<float> c00 = default, c01 = default, c02 = default, c03 = default;
        Vector256<float> c10 = default, c11 = default, c12 = default, c13 = default;
        float* a = A + (row * ARow);
        float* a1 = a + ARow;
        nint bPanel = BPanel;
        nint p = 0;
        for (int n = Panels; n > 0; n--)
        {
            Prefetch<TPanel>(b);
            Vector256<float> x = Vector256.Load(a + p);
            Vector256<float> y = Vector256.Load(a1 + p);
            Vector256<float> w = TPanel.Low(b);
            c00 = Vector256.FusedMultiplyAdd(x, w, c00);
            c10 = Vector256.FusedMultiplyAdd(y, w, c10);
            w = TPanel.Low(b + TPanel.RowBytes);
            c01 = Vector256.FusedMultiplyAdd(x, w, c01);
            c11 = Vector256.FusedMultiplyAdd(y, w, c11);
            w = TPanel.Low(b + (2 * TPanel.RowBytes));
            c02 = Vector256.FusedMultiplyAdd(x, w, c02);
            c12 = Vector256.FusedMultiplyAdd(y, w, c12);
            w = TPanel.Low(b + (3 * TPanel.RowBytes));
            c03 = Vector256.FusedMultiplyAdd(x, w, c03);
            c13 = Vector256.FusedMultiplyAdd(y, w, c13);
            x = Vector256.Load(a + p + 8);
            y = Vector256.Load(a1 + p + 8);
            w = TPanel.High(b);
            c00 = Vector256.FusedMultiplyAdd(x, w, c00);
            c10 = Vector256.FusedMultiplyAdd(y, w, c10);
            w = TPanel.High(b + TPanel.RowBytes);
            c01 = Vector256.FusedMultiplyAdd(x, w, c01);
            c11 = Vector256.FusedMultiplyAdd(y, w, c11);
            w = TPanel.High(b + (2 * TPanel.RowBytes));
            c02 = Vector256.FusedMultiplyAdd(x, w, c02);
            c12 = Vector256.FusedMultiplyAdd(y, w, c12);
            w = TPanel.High(b + (3 * TPanel.RowBytes));
            c03 = Vector256.FusedMultiplyAdd(x, w, c03);
            c13 = Vector256.FusedMultiplyAdd(y, w, c13);
            p += PanelPacking.Width;
            b += bPanel;
        }

        Store(row, column, c00, c01, c02, c03);
        Store(row + 1, column, c10, c11, c12, c13);
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private readonly void Tile1x4<TPanel>(int row, byte* b, int column)
        where TPanel : unmanaged, IPanel
    {
        Vector256<float> c0 = default, c1 = default, c2 = default, c3 = default;
        float* a = A + (row * ARow);
        nint bPanel = BPanel;
        nint p = 0;
        for (int n = Panels; n > 0; n--)
        {
            Prefetch<TPanel>(b);
            Vector256<float> x = Vector256.Load(a + p);
            c0 = Vector256.FusedMultiplyAdd(x, TPanel.Low(b), c0);
            c1 = Vector256.FusedMultiplyAdd(x, TPanel.Low(b + TPanel.RowBytes), c1);
            c2 = Vector256.FusedMultiplyAdd(x, TPanel.Low(b + (2 * TPanel.RowBytes)), c2);
            c3 = Vector256.FusedMultiplyAdd(x, TPanel.Low(b + (3 * TPanel.RowBytes)), c3);
            x = Vector256.Load(a + p + 8);
            c0 = Vector256.FusedMultiplyAdd(x, TPanel.High(b), c0);
            c1 = Vector256.FusedMultiplyAdd(x, TPanel.High(b + TPanel.RowBytes), c1);
            c2 = Vector256.FusedMultiplyAdd(x, TPanel.High(b + (2 * TPanel.RowBytes)), c2);
            c3 = Vector256.FusedMultiplyAdd(x, TPanel.High(b + (3 * TPanel.RowBytes)), c3);
            p += PanelPacking.Width;
            b += bPanel;
        }

        Store(row, column, c0, c1, c2, c3);
    }

    // For the columns behind the last whole four.
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private readonly void Tile1x1<TPanel>(int row, byte* b, int column)
        where TPanel : unmanaged, IPanel
    {
        Vector256<float> sum = default;
        float* a = A + (row * ARow);
        for (int n = 0; n < Panels; n++)
        {
            sum = Vector256.FusedMultiplyAdd(Vector256.Load(a + (n * PanelPacking.Width)), TPanel.Low(b), sum);
            sum = Vector256.FusedMultiplyAdd(Vector256.Load(a + (n * PanelPacking.Width) + 8), TPanel.High(b), sum);
            b += BPanel;
        }

        float* c = C + (row * CRow) + column;
        float value = SumLanes(sum, sum, sum, sum)[0];
        *c = Accumulate ? *c + value : value;
    }

    // The lines that the tiles after next will read, panel by panel: no hardware prefetcher follows that many streams.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Prefetch<TPanel>(byte* b)
        where TPanel : unmanaged, IPanel
    {
        if (Sse.IsSupported)
        {
            Sse.Prefetch0(b + 512);
            Sse.Prefetch0(b + 512 + 64);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private readonly void Store(
        int row, int column, Vector256<float> s0, Vector256<float> s1, Vector256<float> s2, Vector256<float> s3)
    {
        float* c = C + (row * CRow) + column;
        Vector128<float> sums = SumLanes(s0, s1, s2, s3);
        (Accumulate ? Vector128.Load(c) + sums : sums).Store(c);
    }

    // Of each, ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector128<float> SumLanes(Vector256<float> s0, Vector256<float> s1, Vector256<float> s2, Vector256<float> s3)
    {
        if (Avx.IsSupported)
        {
            Vector256<float> halves = Avx.HorizontalAdd(Avx.HorizontalAdd(s0, s1), Avx.HorizontalAdd(s2, s3));
            return halves.GetLower() + halves.GetUpper();
        }

        return Vector128.Create(SumLanes(s0), SumLanes(s1), SumLanes(s2), SumLanes(s3));
    }

    private static float SumLanes(Vector256<float> s) => ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}
