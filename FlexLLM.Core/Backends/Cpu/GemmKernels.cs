using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace FlexLLM.Backends.Cpu;

/// <summary>
/// C (+)= A B in panels of 16 columns. Element A(i, p) is at A + i ARow + p AStep (floats); row p of B's panel j is at
/// B + j BPanel + p BStep (bytes), C(i, 16 j) at C + i CRow + 16 j. Steps may be negative.
/// </summary>
internal unsafe struct Gemm
{
    public float* A;
    public nint ARow;
    public nint AStep;
    public byte* B;
    public nint BStep;
    public nint BPanel;
    public float* C;
    public nint CRow;

    /// <summary>Length of the reduction; 0 leaves an accumulating C as it is and zeroes another.</summary>
    public int K;

    /// <summary>Starts from what C holds instead of from zero.</summary>
    public bool Accumulate;
}

/// <summary>
/// The register tiles under every matrix product of this backend. Each output is one chain of fused multiply-adds in order
/// of p, whatever the tile, so tiles may be chosen for speed and a reduction may be cut anywhere.
/// </summary>
internal static unsafe class GemmKernels
{
    /// <summary>6 rows of one panel: twelve accumulators, two vectors of B, one broadcast.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Tile6<TPanel>(in Gemm g, float* a, byte* b, float* c)
        where TPanel : unmanaged, IPanel
    {
        Vector256<float> c00 = default, c01 = default, c10 = default, c11 = default, c20 = default, c21 = default;
        Vector256<float> c30 = default, c31 = default, c40 = default, c41 = default, c50 = default, c51 = default;
        nint cRow = g.CRow;
        if (g.Accumulate)
        {
            (c00, c01) = (Vector256.Load(c), Vector256.Load(c + 8));
            (c10, c11) = (Vector256.Load(c + cRow), Vector256.Load(c + cRow + 8));
            (c20, c21) = (Vector256.Load(c + (2 * cRow)), Vector256.Load(c + (2 * cRow) + 8));
            (c30, c31) = (Vector256.Load(c + (3 * cRow)), Vector256.Load(c + (3 * cRow) + 8));
            (c40, c41) = (Vector256.Load(c + (4 * cRow)), Vector256.Load(c + (4 * cRow) + 8));
            (c50, c51) = (Vector256.Load(c + (5 * cRow)), Vector256.Load(c + (5 * cRow) + 8));
        }

        float* a1 = a + g.ARow;
        float* a2 = a1 + g.ARow;
        float* a3 = a2 + g.ARow;
        float* a4 = a3 + g.ARow;
        float* a5 = a4 + g.ARow;
        nint aStep = g.AStep;
        nint bStep = g.BStep;
        nint p = 0;
        for (int k = g.K; k > 0; k--)
        {
            Prefetch(b);

            Vector256<float> b0 = TPanel.Low(b);
            Vector256<float> b1 = TPanel.High(b);
            Vector256<float> x = Vector256.Create(a[p]);
            c00 = Vector256.FusedMultiplyAdd(x, b0, c00);
            c01 = Vector256.FusedMultiplyAdd(x, b1, c01);
            x = Vector256.Create(a1[p]);
            c10 = Vector256.FusedMultiplyAdd(x, b0, c10);
            c11 = Vector256.FusedMultiplyAdd(x, b1, c11);
            x = Vector256.Create(a2[p]);
            c20 = Vector256.FusedMultiplyAdd(x, b0, c20);
            c21 = Vector256.FusedMultiplyAdd(x, b1, c21);
            x = Vector256.Create(a3[p]);
            c30 = Vector256.FusedMultiplyAdd(x, b0, c30);
            c31 = Vector256.FusedMultiplyAdd(x, b1, c31);
            x = Vector256.Create(a4[p]);
            c40 = Vector256.FusedMultiplyAdd(x, b0, c40);
            c41 = Vector256.FusedMultiplyAdd(x, b1, c41);
            x = Vector256.Create(a5[p]);
            c50 = Vector256.FusedMultiplyAdd(x, b0, c50);
            c51 = Vector256.FusedMultiplyAdd(x, b1, c51);
            p += aStep;
            b += bStep;
        }

        Store(c, c00, c01);
        Store(c + cRow, c10, c11);
        Store(c + (2 * cRow), c20, c21);
        Store(c + (3 * cRow), c30, c31);
        Store(c + (4 * cRow), c40, c41);
        Store(c + (5 * cRow), c50, c51);
    }

    /// <summary>4 rows of one panel.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Tile4<TPanel>(in Gemm g, float* a, byte* b, float* c)
        where TPanel : unmanaged, IPanel
    {
        Vector256<float> c00 = default, c01 = default, c10 = default, c11 = default;
        Vector256<float> c20 = default, c21 = default, c30 = default, c31 = default;
        nint cRow = g.CRow;
        if (g.Accumulate)
        {
            (c00, c01) = (Vector256.Load(c), Vector256.Load(c + 8));
            (c10, c11) = (Vector256.Load(c + cRow), Vector256.Load(c + cRow + 8));
            (c20, c21) = (Vector256.Load(c + (2 * cRow)), Vector256.Load(c + (2 * cRow) + 8));
            (c30, c31) = (Vector256.Load(c + (3 * cRow)), Vector256.Load(c + (3 * cRow) + 8));
        }

        float* a1 = a + g.ARow;
        float* a2 = a1 + g.ARow;
        float* a3 = a2 + g.ARow;
        nint aStep = g.AStep;
        nint bStep = g.BStep;
        nint p = 0;
        for (int k = g.K; k > 0; k--)
        {
            Prefetch(b);

            Vector256<float> b0 = TPanel.Low(b);
            Vector256<float> b1 = TPanel.High(b);
            Vector256<float> x = Vector256.Create(a[p]);
            c00 = Vector256.FusedMultiplyAdd(x, b0, c00);
            c01 = Vector256.FusedMultiplyAdd(x, b1, c01);
            x = Vector256.Create(a1[p]);
            c10 = Vector256.FusedMultiplyAdd(x, b0, c10);
            c11 = Vector256.FusedMultiplyAdd(x, b1, c11);
            x = Vector256.Create(a2[p]);
            c20 = Vector256.FusedMultiplyAdd(x, b0, c20);
            c21 = Vector256.FusedMultiplyAdd(x, b1, c21);
            x = Vector256.Create(a3[p]);
            c30 = Vector256.FusedMultiplyAdd(x, b0, c30);
            c31 = Vector256.FusedMultiplyAdd(x, b1, c31);
            p += aStep;
            b += bStep;
        }

        Store(c, c00, c01);
        Store(c + cRow, c10, c11);
        Store(c + (2 * cRow), c20, c21);
        Store(c + (3 * cRow), c30, c31);
    }

    /// <summary>2 rows of two panels.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Tile2x2<TPanel>(in Gemm g, float* a, byte* b, float* c)
        where TPanel : unmanaged, IPanel
    {
        Vector256<float> c00 = default, c01 = default, c02 = default, c03 = default;
        Vector256<float> c10 = default, c11 = default, c12 = default, c13 = default;
        float* d = c + g.CRow;
        if (g.Accumulate)
        {
            (c00, c01, c02, c03) = (Vector256.Load(c), Vector256.Load(c + 8), Vector256.Load(c + 16), Vector256.Load(c + 24));
            (c10, c11, c12, c13) = (Vector256.Load(d), Vector256.Load(d + 8), Vector256.Load(d + 16), Vector256.Load(d + 24));
        }

        float* a1 = a + g.ARow;
        nint aStep = g.AStep;
        byte* bNext = b + g.BPanel;
        nint bStep = g.BStep;
        nint p = 0;
        nint q = 0;
        for (int k = g.K; k > 0; k--)
        {
            Vector256<float> x = Vector256.Create(a[p]);
            Vector256<float> y = Vector256.Create(a1[p]);
            Vector256<float> b0 = TPanel.Low(b + q);
            c00 = Vector256.FusedMultiplyAdd(x, b0, c00);
            c10 = Vector256.FusedMultiplyAdd(y, b0, c10);
            Vector256<float> b1 = TPanel.High(b + q);
            c01 = Vector256.FusedMultiplyAdd(x, b1, c01);
            c11 = Vector256.FusedMultiplyAdd(y, b1, c11);
            Vector256<float> b2 = TPanel.Low(bNext + q);
            c02 = Vector256.FusedMultiplyAdd(x, b2, c02);
            c12 = Vector256.FusedMultiplyAdd(y, b2, c12);
            Vector256<float> b3 = TPanel.High(bNext + q);
            c03 = Vector256.FusedMultiplyAdd(x, b3, c03);
            c13 = Vector256.FusedMultiplyAdd(y, b3, c13);
            p += aStep;
            q += bStep;
        }

        Store(c, c00, c01);
        Store(c + 16, c02, c03);
        Store(d, c10, c11);
        Store(d + 16, c12, c13);
    }

    /// <summary>1 row of four panels: eight chains hide the multiply-add's latency, four streams feed the prefetchers.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Tile1x4<TPanel>(in Gemm g, float* a, byte* b, float* c)
        where TPanel : unmanaged, IPanel
    {
        Vector256<float> c0 = default, c1 = default, c2 = default, c3 = default;
        Vector256<float> c4 = default, c5 = default, c6 = default, c7 = default;
        if (g.Accumulate)
        {
            (c0, c1, c2, c3) = (Vector256.Load(c), Vector256.Load(c + 8), Vector256.Load(c + 16), Vector256.Load(c + 24));
            (c4, c5, c6, c7) = (Vector256.Load(c + 32), Vector256.Load(c + 40), Vector256.Load(c + 48), Vector256.Load(c + 56));
        }

        nint aStep = g.AStep;
        nint bStep = g.BStep;
        byte* bNext = b + g.BPanel;
        byte* bThird = bNext + g.BPanel;
        byte* bLast = bThird + g.BPanel;
        nint q = 0;
        for (int k = g.K; k > 0; k--)
        {
            Vector256<float> x = Vector256.Create(*a);
            c0 = Vector256.FusedMultiplyAdd(x, TPanel.Low(b + q), c0);
            c1 = Vector256.FusedMultiplyAdd(x, TPanel.High(b + q), c1);
            c2 = Vector256.FusedMultiplyAdd(x, TPanel.Low(bNext + q), c2);
            c3 = Vector256.FusedMultiplyAdd(x, TPanel.High(bNext + q), c3);
            c4 = Vector256.FusedMultiplyAdd(x, TPanel.Low(bThird + q), c4);
            c5 = Vector256.FusedMultiplyAdd(x, TPanel.High(bThird + q), c5);
            c6 = Vector256.FusedMultiplyAdd(x, TPanel.Low(bLast + q), c6);
            c7 = Vector256.FusedMultiplyAdd(x, TPanel.High(bLast + q), c7);
            a += aStep;
            q += bStep;
        }

        Store(c, c0, c1);
        Store(c + 16, c2, c3);
        Store(c + 32, c4, c5);
        Store(c + 48, c6, c7);
    }

    /// <summary>1 row of one panel, of which only the first columns are stored.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Tile1<TPanel>(in Gemm g, float* a, byte* b, float* c, int columns)
        where TPanel : unmanaged, IPanel
    {
        Vector256<float> c0 = default;
        Vector256<float> c1 = default;
        if (g.Accumulate)
        {
            c0 = VectorMath.Load(c, columns);
            c1 = columns > 8 ? VectorMath.Load(c + 8, columns - 8) : default;
        }

        nint aStep = g.AStep;
        nint bStep = g.BStep;
        for (int k = g.K; k > 0; k--)
        {
            Vector256<float> x = Vector256.Create(*a);
            c0 = Vector256.FusedMultiplyAdd(x, TPanel.Low(b), c0);
            c1 = Vector256.FusedMultiplyAdd(x, TPanel.High(b), c1);
            a += aStep;
            b += bStep;
        }

        if (columns == PanelPacking.Width)
        {
            Store(c, c0, c1);
        }
        else
        {
            StorePart(c, c0, c1, columns);
        }
    }

    // One call for both halves: an accumulator that lives on behind a call would live in memory, in the loop too.
    [MethodImpl(MethodImplOptions.NoInlining)]
    private static void StorePart(float* c, Vector256<float> left, Vector256<float> right, int columns)
    {
        VectorMath.Store(left, c, columns);
        VectorMath.Store(right, c + 8, columns - 8);
    }

    // For batches of few rows, whose weights come from memory: more is in flight than one stream's loads alone bring.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Prefetch(byte* b)
    {
        if (Sse.IsSupported)
        {
            Sse.Prefetch0(b + 1024);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Store(float* c, Vector256<float> left, Vector256<float> right)
    {
        left.Store(c);
        right.Store(c + 8);
    }
}
