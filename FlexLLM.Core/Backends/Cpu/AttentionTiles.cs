using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace FlexLLM.Backends.Cpu;

/// <summary>One sequence in one layer of a KV cache: where each of its blocks lies there.</summary>
internal readonly unsafe struct KvView(CpuKvCache cache, float** blocks)
{
    private readonly float** _blocks = blocks;
    private readonly int _headFloats = cache.HeadFloats;
    private readonly int _keyFloats = cache.KeyFloats;

    public readonly int HeadDim = cache.HeadDim;

    /// <summary>Head dimension rounded up to whole panels: the row length of value tiles and what is packed beside.</summary>
    public readonly int ValueColumns = cache.ValueColumns;

    /// <summary>Key tile [headDim][16] of block b of the sequence.</summary>
    public float* Keys(int head, int b) => _blocks[b] + ((long)head * _headFloats);

    /// <summary>Value tile [16][ValueColumns] of block b of the sequence.</summary>
    public float* Values(int head, int b) => Keys(head, b) + _keyFloats;
}

/// <summary>Pieces that attention forward and backward share.</summary>
internal static unsafe class AttentionTiles
{
    public const int Block = DeviceKvCache.TokensPerBlock;

    /// <summary>Floats between score rows of a context: whole blocks, and never a multiple of a page (cache sets).</summary>
    public static int ScoreStride(int context) => ((context + Block - 1) / Block * Block) + Block;

    /// <summary>How many of block b's positions a row with this many positions attends: 0..16.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static int CountInBlock(int context, int b) => Math.Clamp(context - (b * Block), 0, Block);

    /// <summary>
    /// scores[i][j] = q_i . k_j for the positions of blocks [0, blocks); q [rows][ValueColumns]. Scores at positions that were
    /// never written are undefined, the others do not depend on them.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Scores(in KvView kv, int head, float* q, int rows, int blocks, float* scores, int stride)
    {
        Gemm g = new()
        {
            A = q,
            ARow = kv.ValueColumns,
            AStep = 1,
            BStep = F32Panel.RowBytes,
            CRow = stride,
            K = kv.HeadDim,
        };
        for (int b = 0; b < blocks; b++)
        {
            g.B = (byte*)kv.Keys(head, b);
            g.C = scores + ((long)b * Block);
            GemmBlocks.Multiply<F32Panel>(g, rows, 1, Block);
        }
    }

    /// <summary>destination[0..n) = factor * source[0..n).</summary>
    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    public static void Scale(float* source, float factor, float* destination, int n)
    {
        Vector256<float> f = Vector256.Create(factor);
        for (int c = 0; c < n; c += VectorMath.Lanes)
        {
            VectorMath.Store(Vector256.Load(source + c) * f, destination + c, n - c);
        }
    }

    /// <summary>What a score is divided by, inverted.</summary>
    public static float ScoreScale(int headDim) => 1f / MathF.Sqrt(headDim);
}

/// <summary>Sum of e^(x - shift) over columns, which it leaves in x.</summary>
internal readonly unsafe struct ShiftedExponentials(float* x, float shift) : IColumnSum
{
    private readonly float* _x = x;
    private readonly float _shift = shift;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public Vector256<float> Add(Vector256<float> sum, long column, long count)
    {
        Vector256<float> e = VectorMath.Exp(Vector256.Load(_x + column) - Vector256.Create(_shift));
        VectorMath.Store(e, _x + column, count);
        return sum + (count >= VectorMath.Lanes ? e : e & VectorMath.LanesBelow(count));
    }
}

/// <summary>Sum of a[c] * b[c].</summary>
internal readonly unsafe struct DotProduct(float* a, float* b) : IColumnSum
{
    private readonly float* _a = a;
    private readonly float* _b = b;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public Vector256<float> Add(Vector256<float> sum, long column, long count) =>
        Vector256.FusedMultiplyAdd(VectorMath.Load(_a + column, count), VectorMath.Load(_b + column, count), sum);
}
