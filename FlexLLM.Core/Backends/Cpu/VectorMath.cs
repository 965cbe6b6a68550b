using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace FlexLLM.Backends.Cpu;

/// <summary>Terms of a sum over columns: the struct holds the row pointers.</summary>
internal interface IColumnSum
{
    /// <summary>sum + terms of columns [column, column + min(count, 8)), one per lane; other lanes add zero.</summary>
    Vector256<float> Add(Vector256<float> sum, long column, long count);
}

/// <summary>
/// Eight-lane building blocks. An element gets the same bits in every lane and in a partial vector, because there is no
/// second, scalar formula anywhere.
/// </summary>
internal static unsafe class VectorMath
{
    /// <summary>Floats in a vector.</summary>
    public const int Lanes = 8;

    /// <summary>count floats from p (at most 8), zeros in the lanes behind. Reads 32 bytes: buffers have slack for it.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Load(float* p, long count)
    {
        Vector256<float> v = Vector256.Load(p);
        return count >= Lanes ? v : v & LanesBelow(count);
    }

    /// <summary>Stores the first count lanes (at most 8).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(Vector256<float> v, float* p, long count)
    {
        if (count >= Lanes)
        {
            v.Store(p);
        }
        else
        {
            StorePart(v, p, (int)count);
        }
    }

    /// <summary>All bits set in lanes [0, count).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> LanesBelow(long count) =>
        Vector256.LessThan(Vector256<int>.Indices, Vector256.Create((int)count)).AsSingle();

    /// <summary>
    /// e^x within 2 units in the last place: 0 for -inf, +inf above 88.73, denormals are kept, NaN stays NaN. Range reduction
    /// x = n ln 2 + r and the polynomial of Cephes expf.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Exp(Vector256<float> x)
    {
        Vector256<float> low = Vector256.Create(-105f);
        Vector256<float> high = Vector256.Create(89.5f);
        x = Vector256.ConditionalSelect(Vector256.LessThan(x, low), low, x);
        x = Vector256.ConditionalSelect(Vector256.GreaterThan(x, high), high, x);

        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
        Vector256<float> magic = Vector256.Create(12582912f);
        Vector256<float> shifted = Vector256.FusedMultiplyAdd(x, Vector256.Create(1.44269504088896341f), magic);
        Vector256<float> n = shifted - magic;
        Vector256<float> r = Vector256.FusedMultiplyAdd(n, Vector256.Create(-0.693359375f), x);
        r = Vector256.FusedMultiplyAdd(n, Vector256.Create(2.12194440e-4f), r);

        Vector256<float> p = Vector256.Create(1.9875691500e-4f);
        p = Vector256.FusedMultiplyAdd(p, r, Vector256.Create(1.3981999507e-3f));
        p = Vector256.FusedMultiplyAdd(p, r, Vector256.Create(8.3334519073e-3f));
        p = Vector256.FusedMultiplyAdd(p, r, Vector256.Create(4.1665795894e-2f));
        p = Vector256.FusedMultiplyAdd(p, r, Vector256.Create(1.6666665459e-1f));
        p = Vector256.FusedMultiplyAdd(p, r, Vector256.Create(5.0000001201e-1f));
        p = Vector256.FusedMultiplyAdd(p, r * r, r) + Vector256<float>.One;

        // 2^n in two factors, because n reaches below -126 and above 127.
        Vector256<int> exponent = shifted.AsInt32() - magic.AsInt32();
        Vector256<int> half = Vector256.ShiftRightArithmetic(exponent, 1);
        return p * PowerOfTwo(half) * PowerOfTwo(exponent - half);
    }

    /// <summary>1 / (1 + e^-x).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Sigmoid(Vector256<float> x) =>
        Vector256<float>.One / (Vector256<float>.One + Exp(-x));

    /// <summary>Sum over columns [0, n). Column c goes to accumulator c / 8 % 4, lane c % 8; one fixed tree joins them.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Sum<TSum>(TSum terms, long n)
        where TSum : struct, IColumnSum
    {
        Vector256<float> s0 = default, s1 = default, s2 = default, s3 = default;
        long c = 0;
        for (; c + 32 <= n; c += 32)
        {
            s0 = terms.Add(s0, c, Lanes);
            s1 = terms.Add(s1, c + 8, Lanes);
            s2 = terms.Add(s2, c + 16, Lanes);
            s3 = terms.Add(s3, c + 24, Lanes);
        }

        s0 = c < n ? terms.Add(s0, c, n - c) : s0;
        s1 = c + 8 < n ? terms.Add(s1, c + 8, n - c - 8) : s1;
        s2 = c + 16 < n ? terms.Add(s2, c + 16, n - c - 16) : s2;
        s3 = c + 24 < n ? terms.Add(s3, c + 24, n - c - 24) : s3;
        return SumLanes((s0 + s1) + (s2 + s3));
    }

    /// <summary>Largest of n floats; -inf of none.</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static float Max(float* x, long n)
    {
        Vector256<float> lowest = Vector256.Create(float.NegativeInfinity);
        Vector256<float> m0 = lowest;
        Vector256<float> m1 = lowest;
        long c = 0;
        for (; c + 16 <= n; c += 16)
        {
            m0 = Vector256.Max(m0, Vector256.Load(x + c));
            m1 = Vector256.Max(m1, Vector256.Load(x + c + 8));
        }

        for (; c < n; c += Lanes)
        {
            Vector256<float> part = Vector256.Load(x + c);
            m0 = Vector256.Max(m0, n - c >= Lanes ? part : Vector256.ConditionalSelect(LanesBelow(n - c), part, lowest));
        }

        m0 = Vector256.Max(m0, m1);
        float max = m0[0];
        for (int i = 1; i < Lanes; i++)
        {
            max = MathF.Max(max, m0[i]);
        }

        return max;
    }

    private static float SumLanes(Vector256<float> v)
    {
        Vector128<float> h = v.GetLower() + v.GetUpper();
        return (h[0] + h[2]) + (h[1] + h[3]);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<float> PowerOfTwo(Vector256<int> n) =>
        Vector256.ShiftLeft(n + Vector256.Create(127), 23).AsSingle();

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static void StorePart(Vector256<float> v, float* p, int count)
    {
        for (int i = 0; i < count; i++)
        {
            p[i] = v[i];
        }
    }
}
