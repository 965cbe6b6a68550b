using System.Runtime.CompilerServices;

namespace FlexLLM.Backends.Cpu;

/// <summary>Covers a block of rows and panels with register tiles, on the calling thread.</summary>
internal static unsafe class GemmBlocks
{
    /// <summary>Floats from one panel of C to the next.</summary>
    private const int Width = PanelPacking.Width;

    /// <summary>All of g for rows x panels; of the last panel only lastColumns columns are stored.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Multiply<TPanel>(in Gemm g, int rows, int panels, int lastColumns)
        where TPanel : unmanaged, IPanel
    {
        int full = lastColumns == Width ? panels : panels - 1;
        int rest = rows % 6;
        int tiled = rows - rest + (rest >= 4 ? 4 : 0);
        for (int j = 0; j < full; j++)
        {
            byte* b = g.B + (j * g.BPanel);
            float* c = g.C + (j * Width);
            int i = 0;
            for (; i + 6 <= rows; i += 6)
            {
                GemmKernels.Tile6<TPanel>(g, g.A + (i * g.ARow), b, c + (i * g.CRow));
            }

            if (i < tiled)
            {
                GemmKernels.Tile4<TPanel>(g, g.A + (i * g.ARow), b, c + (i * g.CRow));
            }
        }

        if (rows - tiled >= 2)
        {
            TwoRows<TPanel>(g, tiled, full);
            tiled += 2;
        }

        if (tiled < rows)
        {
            OneRow<TPanel>(g, tiled, full);
        }

        for (int i = 0; full < panels && i < rows; i++)
        {
            float* c = g.C + (i * g.CRow) + (full * Width);
            GemmKernels.Tile1<TPanel>(g, g.A + (i * g.ARow), g.B + (full * g.BPanel), c, lastColumns);
        }
    }

    /// <summary>
    /// Like <see cref="Multiply"/> with a reduction of its own length counts[i] for each row: the tile runs over what all rows
    /// share, each row goes on alone. Nothing behind a row's count is read into it. g.K is ignored.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void MultiplyRagged<TPanel>(in Gemm g, int rows, int panels, int lastColumns, int* counts)
        where TPanel : unmanaged, IPanel
    {
        int common = int.MaxValue;
        for (int i = 0; i < rows; i++)
        {
            common = Math.Min(common, counts[i]);
        }

        Gemm shared = g;
        shared.K = common;
        if (common > 0 || !g.Accumulate)
        {
            Multiply<TPanel>(shared, rows, panels, lastColumns);
        }

        for (int i = 0; i < rows; i++)
        {
            if (counts[i] > common)
            {
                Gemm row = g;
                row.A += (i * g.ARow) + (common * g.AStep);
                row.B += common * g.BStep;
                row.C += i * g.CRow;
                row.K = counts[i] - common;
                row.Accumulate = true;
                Multiply<TPanel>(row, 1, panels, lastColumns);
            }
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void TwoRows<TPanel>(in Gemm g, int row, int panels)
        where TPanel : unmanaged, IPanel
    {
        float* a = g.A + (row * g.ARow);
        float* c = g.C + (row * g.CRow);
        int j = 0;
        for (; j + 2 <= panels; j += 2)
        {
            GemmKernels.Tile2x2<TPanel>(g, a, g.B + (j * g.BPanel), c + (j * Width));
        }

        if (j < panels)
        {
            GemmKernels.Tile1<TPanel>(g, a, g.B + (j * g.BPanel), c + (j * Width), Width);
            GemmKernels.Tile1<TPanel>(g, a + g.ARow, g.B + (j * g.BPanel), c + g.CRow + (j * Width), Width);
        }
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static void OneRow<TPanel>(in Gemm g, int row, int panels)
        where TPanel : unmanaged, IPanel
    {
        float* a = g.A + (row * g.ARow);
        float* c = g.C + (row * g.CRow);
        int j = 0;
        for (; j + 4 <= panels; j += 4)
        {
            GemmKernels.Tile1x4<TPanel>(g, a, g.B + (j * g.BPanel), c + (j * Width));
        }

        for (; j < panels; j++)
        {
            GemmKernels.Tile1<TPanel>(g, a, g.B + (j * g.BPanel), c + (j * Width), Width);
        }
    }
}
