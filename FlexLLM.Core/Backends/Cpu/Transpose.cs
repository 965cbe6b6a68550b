using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using System.Runtime.Intrinsics.X86;

namespace FlexLLM.Backends.Cpu;

/// <summary>Transposes 16 x 16 tiles into dense F32.</summary>
internal static unsafe class Transpose
{
    private const int Size = PanelPacking.Width;

    /// <summary>
    /// destination[c][r] = source[r][c] for 16 rows, of which the first <paramref name="rows"/> exist; the others count as zero.
    /// Rows lie step and destinationStep floats apart.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Tile(float* source, nint step, int rows, float* destination, nint destinationStep)
    {
        if (rows >= Size)
        {
            Whole(source, step, destination, destinationStep);
            return;
        }

        float* padded = stackalloc float[Size * Size];
        for (int r = 0; r < Size; r++)
        {
            (r < rows ? Vector256.Load(source + (r * step)) : default).Store(padded + (r * Size));
            (r < rows ? Vector256.Load(source + (r * step) + 8) : default).Store(padded + (r * Size) + 8);
        }

        Whole(padded, Size, destination, destinationStep);
    }

    /// <summary>destination[step c + r] = source[8 r + c]: a dense 8 x 8 tile.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Eight(float* source, float* destination, nint step) =>
        Eight(
            Vector256.Load(source), Vector256.Load(source + 8), Vector256.Load(source + 16), Vector256.Load(source + 24),
            Vector256.Load(source + 32), Vector256.Load(source + 40), Vector256.Load(source + 48), Vector256.Load(source + 56),
            destination, step);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Whole(float* source, nint step, float* destination, nint destinationStep)
    {
        for (int r = 0; r < Size; r += 8)
        {
            for (int c = 0; c < Size; c += 8)
            {
                float* s = source + (r * step) + c;
                Eight(
                    Vector256.Load(s), Vector256.Load(s + step), Vector256.Load(s + (2 * step)), Vector256.Load(s + (3 * step)),
                    Vector256.Load(s + (4 * step)), Vector256.Load(s + (5 * step)), Vector256.Load(s + (6 * step)),
                    Vector256.Load(s + (7 * step)), destination + (c * destinationStep) + r, destinationStep);
            }
        }
    }

    // Rows r0..r7 become columns: lane i of all of them goes to destination + i * step.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Eight(
        Vector256<float> r0, Vector256<float> r1, Vector256<float> r2, Vector256<float> r3, Vector256<float> r4,
        Vector256<float> r5, Vector256<float> r6, Vector256<float> r7, float* destination, nint step)
    {
        if (!Avx.IsSupported)
        {
            Lanes(r0, destination, step);
            Lanes(r1, destination + 1, step);
            Lanes(r2, destination + 2, step);
            Lanes(r3, destination + 3, step);
            Lanes(r4, destination + 4, step);
            Lanes(r5, destination + 5, step);
            Lanes(r6, destination + 6, step);
            Lanes(r7, destination + 7, step);
            return;
        }

        Vector256<float> t0 = Avx.UnpackLow(r0, r1);
        Vector256<float> t1 = Avx.UnpackHigh(r0, r1);
        Vector256<float> t2 = Avx.UnpackLow(r2, r3);
        Vector256<float> t3 = Avx.UnpackHigh(r2, r3);
        Vector256<float> t4 = Avx.UnpackLow(r4, r5);
        Vector256<float> t5 = Avx.UnpackHigh(r4, r5);
        Vector256<float> t6 = Avx.UnpackLow(r6, r7);
        Vector256<float> t7 = Avx.UnpackHigh(r6, r7);
        Halves(Avx.Shuffle(t0, t2, 0x44), Avx.Shuffle(t4, t6, 0x44), destination, step);
        Halves(Avx.Shuffle(t0, t2, 0xEE), Avx.Shuffle(t4, t6, 0xEE), destination + step, step);
        Halves(Avx.Shuffle(t1, t3, 0x44), Avx.Shuffle(t5, t7, 0x44), destination + (2 * step), step);
        Halves(Avx.Shuffle(t1, t3, 0xEE), Avx.Shuffle(t5, t7, 0xEE), destination + (3 * step), step);
    }

    // Left holds lanes i and i + 4 of rows 0..3, right those of rows 4..7.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Halves(Vector256<float> left, Vector256<float> right, float* destination, nint step)
    {
        Avx.Permute2x128(left, right, 0x20).Store(destination);
        Avx.Permute2x128(left, right, 0x31).Store(destination + (4 * step));
    }

    private static void Lanes(Vector256<float> row, float* destination, nint step)
    {
        for (int i = 0; i < 8; i++)
        {
            destination[i * step] = row[i];
        }
    }
}
