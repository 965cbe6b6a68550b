using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// Writing the KV cache, and causal attention over it: keys and values of a sequence are gathered by its block table, as F32 whatever
/// the cache holds, and each KV head is one product with all rows of its query heads. Requests on a GPU that has all in BF16 go through
/// libtorch's fused attention instead: see <see cref="TorchContext.AttendsInBf16"/>. It keeps no log-sum-exp: windows that need one do not.
/// </summary>
internal static class AttentionOps
{
    // What a gathered position of a sequence counts for when decode rows are put together: its keys and values in many a model.
    private const long ElementsPerPosition = 256;

    // Where positions [0, end) of each sequence lie, [sequences * end]. A shorter one is filled up with its last position.
    private static readonly SequenceIndices Slots = new(marker: -1, (in AttentionSegment segment, int length, Span<long> slots) =>
    {
        ((TorchKvCache)segment.Cache).Place(segment, 0, slots[..length]);
        slots[length..].Fill(slots[length - 1]);
    });

    // What lies behind a sequence that is filled up, and what does not.
    private static readonly SequenceIndices Hidden = MaskOf(marker: -2, inside: 0, behind: 1);
    private static readonly SequenceIndices Seen = MaskOf(marker: -3, inside: 1, behind: 0);

    // The masks of rows of a prompt.
    private const long CausalMarker = -4;

    /// <summary>
    /// Temporaries of a call in bytes: of the segment or the run of decode rows that needs most, or of an append.
    /// </summary>
    public static long ScratchBytes(TorchContext context, in ScratchLimits limits)
    {
        long positions = limits.Positions;
        long queryColumns = (long)limits.QueryHeads * limits.HeadDim;

        // Scores, their softmax, and what logsumexp makes of them; queries turned and scaled, the result.
        long rows = RowsMax(context, limits);
        long scores = sizeof(float) * (limits.Trains ? 3 : 2) * rows * limits.QueryHeads * positions;
        long products = scores + (3 * sizeof(float) * rows * queryColumns) + NarrowBytes(context, limits, rows) + MaskBytes(rows);
        long window = (GatheredBytes(limits) * positions) + Math.Max(StoredBytes(context, limits, positions), products);
        long own = Math.Max(window, FusedBytes(context, limits));
        return Math.Max(AppendBytes(context, limits), Math.Max(own, DecodeBytes(context, limits)));
    }

    /// <summary>
    /// Of rows of a prompt in fused attention: keys and values as they are stored, queries turned, the result as it comes and turned, and
    /// the mask: of rows in F32, twice, and as what it says; of query heads as such, which may stay, and in BF16. On the host, whose
    /// libtorch may have no fused kernel, scores and probabilities too.
    /// </summary>
    public static long FusedBytes(TorchContext context, in ScratchLimits limits)
    {
        if (!context.AttendsInBf16)
        {
            return 0;
        }

        long group = limits.QueryHeads / limits.KvHeads;
        long rows = Math.Min(limits.Rows, context.RowsPerPiece(group * limits.Positions));
        long stored = DTypes.BytesOf(DType.BF16);
        long scores = context.OnHost ? 2 * stored * rows * limits.QueryHeads * limits.Positions : 0;
        return scores + (limits.Positions * (sizeof(long) + (2 * stored * limits.KvHeads * limits.HeadDim)))
            + (rows * limits.Positions * ((2 * sizeof(float)) + 1 + (group * (1 + stored))))
            + (3 * stored * rows * limits.QueryHeads * limits.HeadDim);
    }

    /// <summary>Of all decode rows: beside what is gathered, indices of what is hidden, which is a byte at last, and scores.</summary>
    public static long DecodeBytes(TorchContext context, in ScratchLimits limits)
    {
        long positions = limits.Positions;
        long together = Math.Min(Math.Max(positions, context.ElementsMax / ElementsPerPosition), limits.Segments * positions);
        long products = (together * (sizeof(long) + 1 + (2 * sizeof(float) * limits.QueryHeads)))
            + (3L * sizeof(float) * limits.Segments * limits.QueryHeads * limits.HeadDim)
            + NarrowBytes(context, limits, limits.Segments);
        return (GatheredBytes(limits) * together) + Math.Max(StoredBytes(context, limits, together), products);
    }

    /// <summary>
    /// Indices, and keys that libtorch may copy, or that are rounded and may be copied so: as many bytes. Widened ones are twice as many.
    /// </summary>
    public static long AppendBytes(TorchContext context, in ScratchLimits limits)
    {
        long widened = context.ActivationType != DType.F32 && context.KvType == DType.F32 ? 2 : 1;
        return limits.Rows * (sizeof(long) + (widened * sizeof(float) * limits.KvHeads * limits.HeadDim));
    }

    /// <summary>BF16 queries turned, before they become F32.</summary>
    public static long NarrowBytes(TorchContext context, in ScratchLimits limits, long rows) =>
        context.ActivationType == DType.F32 ? 0 : rows * limits.QueryHeads * limits.HeadDim * DTypes.BytesOf(context.ActivationType);

    /// <summary>Values as they are stored, while they become F32; gone before there are scores.</summary>
    public static long StoredBytes(TorchContext context, in ScratchLimits limits, long positions) =>
        context.KvType == DType.F32 ? 0 : positions * limits.KvHeads * limits.HeadDim * DTypes.BytesOf(context.KvType);

    /// <summary>Rows of a segment that are computed at a time.</summary>
    public static long RowsMax(TorchContext context, in ScratchLimits limits) =>
        Math.Min(limits.Rows, context.RowsPerPiece((long)limits.QueryHeads * limits.Positions));

    /// <summary>Ones, those above the diagonal, and which they are.</summary>
    public static long MaskBytes(long rows) => ((2 * sizeof(float)) + 1) * rows * rows;

    public static void AppendKv(
        TorchContext context, TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        Check.That(k.Rows == v.Rows && k.Columns == v.Columns && k.Tensor.Type == v.Tensor.Type);
        for (int i = 0, next; i < segments.Length; i = next)
        {
            TorchKvCache cache = (TorchKvCache)segments[i].Cache;
            Check.That(k.Columns == cache.KvHeads * cache.HeadDim);

            // Rows that follow each other into the same cache go in one call.
            int start = segments[i].RowStart;
            int end = start + segments[i].RowCount;
            for (next = i + 1; next < segments.Length && segments[next].Cache == cache && segments[next].RowStart == end; next++)
            {
                end += segments[next].RowCount;
            }

            Append(context, k.Slice(start, end - start), v.Slice(start, end - start), cache, layer, segments[i..next]);
        }
    }

    public static void Run(
        TorchContext context, TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        Check.That(q.Rows == o.Rows && q.Columns == o.Columns);
        for (int i = 0, next; i < segments.Length; i = next)
        {
            AttentionSegment segment = segments[i];
            HeadLayout heads = HeadLayout.Of(segment, q.Columns);
            next = i + DecodeRun(context, segments[i..]);
            if (next - i > (IsFused(context, q) ? 0 : 1))
            {
                TensorSlice rows = q.Slice(segment.RowStart, next - i);
                Decode(context, rows, o.Slice(segment.RowStart, next - i), heads, layer, segments[i..next]);
            }
            else
            {
                next = i + 1;
                Check.That(segment.LogSumExp is null || segment.LogSumExp.Columns == heads.QueryHeads);
                Forward(context, q.Slice(segment.RowStart, segment.RowCount), o, heads, layer, segment);
            }
        }
    }

    /// <summary>Keys and values of positions [0, end), each [KV heads, end, head dimension].</summary>
    public static (Tensor Keys, Tensor Values) Gather(TorchContext context, in AttentionSegment segment, int layer, int end)
    {
        var one = new ReadOnlySpan<AttentionSegment>(in segment);
        return ((TorchKvCache)segment.Cache).Read(layer, context.Indices(Slots, one, end));
    }

    /// <summary>
    /// Sets scores [KV heads, rows * group, end] of positions that a row may not see; row i of <paramref name="rows"/> sees all
    /// but the last rows - 1 - i.
    /// </summary>
    public static void Mask(TorchContext context, Tensor scores, in HeadLayout heads, int rows, int end, Scalar value)
    {
        if (rows > 1)
        {
            Tensor above = torch.ones((long)rows, (long)rows, torch.ScalarType.Float32, context.Device).triu(1).gt(TorchContext.Zero);
            Tensor last = scores.view(heads.KvHeads, rows, heads.Group, end).narrow(3, end - rows, rows);
            last.masked_fill_(above.view(rows, 1, rows), value);
        }
    }

    private static SequenceIndices MaskOf(int marker, long inside, long behind) => new(
        marker,
        (in AttentionSegment _, int length, Span<long> mask) =>
        {
            mask[..length].Fill(inside);
            mask[length..].Fill(behind);
        },
        isMask: true);

    private static bool IsFused(TorchContext context, TensorSlice q) => context.AttendsInBf16 && TorchContext.IsBf16(q);

    // A position's keys and values as F32, and its index.
    private static long GatheredBytes(in ScratchLimits limits) =>
        (2L * sizeof(float) * limits.KvHeads * limits.HeadDim) + sizeof(long);

    private static void Append(
        TorchContext context, TensorSlice k, TensorSlice v, TorchKvCache cache, int layer,
        ReadOnlySpan<AttentionSegment> segments)
    {
        Check.That((uint)layer < (uint)cache.Layers);
        Span<long> slots = context.IndexBuffer(k.Rows);
        int row = 0;
        foreach (ref readonly AttentionSegment segment in segments)
        {
            cache.Place(segment, segment.PositionStart, slots.Slice(row, segment.RowCount));
            row += segment.RowCount;
        }

        if (k.Rows == 0)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        var headByHead = ViewShape.Cube(cache.KvHeads, k.Rows, cache.HeadDim, cache.HeadDim, k.Columns);
        cache.Write(layer, context.Indices(slots), TorchContext.Of(k, headByHead), TorchContext.Of(v, headByHead), k.Tensor.Type);
    }

    private static void Forward(
        TorchContext context, TensorSlice q, TensorSlice o, in HeadLayout heads, int layer, in AttentionSegment segment)
    {
        (int start, int count) = (segment.PositionStart, segment.RowCount);
        TensorSlice? logSumExp = segment.LogSumExp?.Slice(start, count);
        if (count == 0)
        {
            return;
        }

        if (IsFused(context, q) && logSumExp is null)
        {
            Fused(context, q, o.Slice(segment.RowStart, count), heads, layer, segment);
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        (Tensor keys, Tensor values) = Gather(context, segment, layer, start + count);
        Tensor keysTurned = keys.transpose(1, 2);
        int chunk = context.RowsPerPiece((long)heads.QueryHeads * (start + count));
        for (int first = 0; first < count; first += chunk)
        {
            using DisposeScope? inner = chunk < count ? torch.NewDisposeScope() : null;
            int rows = Math.Min(chunk, count - first);
            int end = start + first + rows;
            bool seesAll = first + rows == count;
            Tensor queries = heads.Split(q.Slice(first, rows)).mul(context.Constant(heads.Scale));
            Tensor scores = queries.bmm(seesAll ? keysTurned : keysTurned.narrow(2, 0, end));
            Mask(context, scores, heads, rows, end, TorchContext.MinusInfinity);
            Tensor result = scores.softmax(-1).bmm(seesAll ? values : values.narrow(1, 0, end));
            heads.Join(result, o.Slice(segment.RowStart + first, rows));
            if (logSumExp is TensorSlice stored)
            {
                Tensor sums = scores.logsumexp(-1).view(heads.KvHeads, rows, heads.Group).permute(1, 0, 2);
                TorchContext.Of(stored.Slice(first, rows)).view(rows, heads.KvHeads, heads.Group).copy_(sums);
            }
        }
    }

    // Rows of one sequence: the query heads of a KV head are so many queries more, each with the mask of its row.
    private static void Fused(
        TorchContext context, TensorSlice q, TensorSlice o, in HeadLayout heads, int layer, in AttentionSegment segment)
    {
        using DisposeScope scope = torch.NewDisposeScope();
        (int start, int count) = (segment.PositionStart, segment.RowCount);
        var one = new ReadOnlySpan<AttentionSegment>(in segment);
        (Tensor keys, Tensor values) = ((TorchKvCache)segment.Cache).ReadStored(layer, context.Indices(Slots, one, start + count));
        int chunk = context.RowsPerPiece((long)heads.Group * (start + count));
        for (int first = 0; first < count; first += chunk)
        {
            using DisposeScope inner = torch.NewDisposeScope();
            int rows = Math.Min(chunk, count - first);
            int end = start + first + rows;
            long queries = (long)rows * heads.Group;
            int group = heads.Group;
            Tensor seen = context.Kept([CausalMarker, rows, group, end], queries * end, () => Causal(context, rows, group, end));
            Tensor result = torch.nn.functional.scaled_dot_product_attention(
                heads.SplitStored(q.Slice(first, rows)).view(1, heads.KvHeads, queries, heads.HeadDim), Prefix(keys, heads, end),
                Prefix(values, heads, end), seen);
            heads.Join(result.reshape(heads.KvHeads, queries, heads.HeadDim), o.Slice(first, rows));
        }
    }

    // What each query head of the last rows before a position sees, [rows * group, end].
    private static Tensor Causal(TorchContext context, long rows, long group, long end)
    {
        Tensor seen = torch.ones(rows, end, torch.ScalarType.Float32, context.Device).triu(end - rows + 1).le(TorchContext.Zero);
        Tensor each = torch.ones(group, 1, torch.ScalarType.Bool, context.Device);
        return seen.view(rows, 1, end).mul(each).view(rows * group, end);
    }

    // Of what was gathered, [KV heads, positions, head dimension], the first positions, as [1, KV heads, end, head dimension].
    private static Tensor Prefix(Tensor gathered, in HeadLayout heads, int end) =>
        gathered.narrow(1, 0, end).reshape(1, heads.KvHeads, end, heads.HeadDim);

    // How many decode rows from the first on follow each other in the batch and go in one call.
    private static int DecodeRun(TorchContext context, ReadOnlySpan<AttentionSegment> segments)
    {
        long longest = 0;
        for (int i = 0; i < segments.Length; i++)
        {
            AttentionSegment segment = segments[i];
            longest = Math.Max(longest, segment.PositionStart + 1);
            if (segment.RowCount != 1 || segment.LogSumExp is not null || segment.Cache != segments[0].Cache
                || segment.RowStart != segments[0].RowStart + i || (i > 0 && (i + 1) * longest * ElementsPerPosition > context.ElementsMax))
            {
                return i;
            }
        }

        return segments.Length;
    }

    // One row of each sequence. Shorter sequences are filled up with their own last position, which is finite, and masked there.
    private static void Decode(
        TorchContext context, TensorSlice q, TensorSlice o, in HeadLayout heads, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        TorchKvCache cache = (TorchKvCache)segments[0].Cache;
        (int count, int end, int shortest) = (segments.Length, 0, int.MaxValue);
        foreach (ref readonly AttentionSegment segment in segments)
        {
            (end, shortest) = (Math.Max(end, segment.PositionStart + 1), Math.Min(shortest, segment.PositionStart + 1));
        }

        using DisposeScope scope = torch.NewDisposeScope();
        if (IsFused(context, q))
        {
            DecodeFused(context, q, o, heads, layer, segments, end, isRagged: shortest < end);
            return;
        }

        (Tensor keys, Tensor values) = cache.Read(layer, context.Indices(Slots, segments, end));
        long batch = (long)heads.KvHeads * count;
        keys = keys.view(batch, end, heads.HeadDim);
        values = values.view(batch, end, heads.HeadDim);
        Tensor queries = heads.Split(q).view(batch, heads.Group, heads.HeadDim).mul(context.Constant(heads.Scale));
        Tensor scores = queries.bmm(keys.transpose(1, 2));
        if (shortest < end)
        {
            Tensor isHidden = context.Indices(Hidden, segments, end);
            scores.view(heads.KvHeads, count, heads.Group, end)
                .masked_fill_(isHidden.view(count, 1, end), TorchContext.MinusInfinity);
        }

        heads.Join(scores.softmax(-1).bmm(values), o);
    }

    // The same, in the scope that is open: the query heads of a KV head are as many queries.
    private static void DecodeFused(
        TorchContext context, TensorSlice q, TensorSlice o, HeadLayout heads, int layer, ReadOnlySpan<AttentionSegment> segments, int end,
        bool isRagged)
    {
        int count = segments.Length;
        Tensor? seen = isRagged ? context.Indices(Seen, segments, end).view(count, 1, 1, end) : null;
        (Tensor keys, Tensor values) = ((TorchKvCache)segments[0].Cache).ReadStored(layer, context.Indices(Slots, segments, end));
        Tensor result = torch.nn.functional.scaled_dot_product_attention(
            TorchContext.Of(q, heads.RowByRow(q)), BySequence(keys), BySequence(values), seen);
        TorchContext.Of(o, heads.RowByRow(o)).copy_(result);

        // [KV heads, sequences * end, head dimension] as [sequences, KV heads, end, head dimension].
        Tensor BySequence(Tensor gathered) => gathered.view(heads.KvHeads, count, end, heads.HeadDim).transpose(0, 1);
    }
}

/// <summary>How the columns of a row fall into heads.</summary>
internal readonly record struct HeadLayout(int KvHeads, int Group, int HeadDim)
{
    public int QueryHeads => KvHeads * Group;

    public double Scale => 1.0 / Math.Sqrt(HeadDim);

    public static HeadLayout Of(in AttentionSegment segment, int queryColumns)
    {
        DeviceKvCache cache = segment.Cache;
        int group = queryColumns / (cache.KvHeads * cache.HeadDim);
        Check.That(group > 0 && group * cache.KvHeads * cache.HeadDim == queryColumns);
        return new HeadLayout(cache.KvHeads, group, cache.HeadDim);
    }

    /// <summary>
    /// [rows, query heads * head dimension] as F32 [KV heads, rows * group, head dimension]: a copy, or the same elements, so only to be
    /// read.
    /// </summary>
    public Tensor Split(TensorSlice rows)
    {
        Tensor split = SplitStored(rows);
        return TorchContext.IsBf16(rows) ? split.to_type(torch.ScalarType.Float32) : split;
    }

    /// <summary>The same as it is stored.</summary>
    public Tensor SplitStored(TensorSlice rows) => rows.Rows == 1
        ? TorchContext.Of(rows, OneRow)
        : TorchContext.Of(rows, Turned(rows)).reshape(KvHeads, (long)rows.Rows * Group, HeadDim);

    /// <summary>Writes what <see cref="Split"/> makes back to rows.</summary>
    public void Join(Tensor split, TensorSlice rows)
    {
        if (rows.Rows == 1)
        {
            TorchContext.Of(rows, OneRow).copy_(split);
        }
        else
        {
            TorchContext.Of(rows, Turned(rows)).copy_(split.view(KvHeads, rows.Rows, Group, HeadDim));
        }
    }

    /// <summary>[rows, KV heads, group, head dimension]: the query heads of a KV head are as many queries.</summary>
    public ViewShape RowByRow(TensorSlice rows) =>
        new(rows.Rows, KvHeads, Group, HeadDim, rows.Columns, (long)Group * HeadDim, HeadDim);

    private ViewShape OneRow => ViewShape.Cube(KvHeads, Group, HeadDim, (long)Group * HeadDim, HeadDim);

    // [KV heads, rows, group, head dimension].
    private ViewShape Turned(TensorSlice rows) => new(KvHeads, rows.Rows, Group, HeadDim, (long)Group * HeadDim, rows.Columns, HeadDim);
}
