using FlexLLM.Backends;

namespace FlexLLM.Tests.Contracts;

/// <summary>Rows [Start, Start + Count) of one sequence, held by the cache with this number.</summary>
internal readonly record struct Part(int Start, int Count, int Cache = 0);

/// <summary>
/// AppendKv, Attention and AttentionBackward over scattered blocks whose unwritten slots hold NaN. What AppendKv stored can
/// be seen only through attention.
/// </summary>
internal static class AttentionChecks
{
    /// <summary>
    /// One batch of parts, each a sequence of its own, on two layers with different contents; rows outside the parts are NaN
    /// in q, k and v and must keep their o.
    /// </summary>
    public static void Forward(
        IComputeBackend backend, HeadShape shape, bool keepLogSumExp, double scale, params Part[] parts)
    {
        using var bench = new Workbench(backend);
        int blocks = parts.Sum(part => PagedCache.BlocksFor(part.Start + part.Count) + 1);
        PagedCache[] caches =
            [.. Enumerable.Range(0, 1 + parts.Max(part => part.Cache)).Select(_ => new PagedCache(bench, shape, blocks))];
        int rows = parts.Sum(part => part.Count) + parts.Length + 1;
        var sequences = new Sequence[parts.Length];
        for (int i = 0, row = 1; i < parts.Length; row += parts[i].Count + 1, i++)
        {
            sequences[i] = new Sequence(bench, caches[parts[i].Cache], parts[i], row, keepLogSumExp, scale);
        }

        // All layers are appended before any is attended: a layer that spills into another is seen.
        AttentionSegment[] segments = [.. sequences.Select(sequence => sequence.Segment)];
        for (int layer = 0; layer < PagedCache.Layers; layer++)
        {
            (Matrix k, Matrix v) = (Nan(rows, shape.KvColumns), Nan(rows, shape.KvColumns));
            foreach (Sequence sequence in sequences)
            {
                sequence.AppendPrefix(layer);
                (Matrix ownK, Matrix ownV) = sequence.Given[layer];
                k.SetRows(sequence.Segment.RowStart, ownK.Slice(sequence.Part.Start, sequence.Part.Count));
                v.SetRows(sequence.Segment.RowStart, ownV.Slice(sequence.Part.Start, sequence.Part.Count));
            }

            backend.AppendKv(bench.Source(k), bench.Source(v), layer, segments);
        }

        for (int layer = 0; layer < PagedCache.Layers; layer++)
        {
            Matrix q = Nan(rows, shape.QueryColumns);
            foreach (Sequence sequence in sequences)
            {
                q.SetRows(sequence.Segment.RowStart, sequence.Q);
            }

            Operand o = bench.Target(Matrix.Filled(rows, shape.QueryColumns, 77));
            backend.Attention(bench.Source(q), o, layer, segments);
            VerifyForward(sequences, layer, o.Read());
        }

        bench.Verify();
    }

    /// <summary>
    /// One window of a sample of so many positions. dK, dV rows after the window, and log-sum-exp rows outside, are NaN.
    /// </summary>
    public static void Backward(
        IComputeBackend backend, HeadShape shape, int positions, int start, int count, double scale = 1)
    {
        using var bench = new Workbench(backend);
        int end = start + count;
        var cache = new PagedCache(bench, shape, 3 * (PagedCache.BlocksFor(positions) + 1));
        var sequence = new Sequence(bench, cache, new Part(start, count), 0, keepLogSumExp: true, scale, positions);
        (Matrix q, Matrix dO) = (sequence.Q, bench.Random(count, shape.QueryColumns));
        (Operand deviceQ, Operand dQ) = (bench.Source(q), bench.Output(count, shape.QueryColumns));
        (Matrix oldDK, Matrix oldDV) = (Nan(positions, shape.KvColumns), Nan(positions, shape.KvColumns));
        oldDK.SetRows(0, bench.Random(end, shape.KvColumns));
        oldDV.SetRows(0, bench.Random(end, shape.KvColumns));
        (Operand dK, Operand dV) = (bench.Accumulator(oldDK), bench.Accumulator(oldDV));

        const int layer = 1;
        cache.Append(sequence.Given[0].K, sequence.Given[0].V, 0, sequence.Segment.BlockTable);
        cache.Append(sequence.Given[layer].K, sequence.Given[layer].V, layer, sequence.Segment.BlockTable);
        backend.Attention(deviceQ, bench.Output(count, shape.QueryColumns), layer, [sequence.Segment]);
        AttentionSegment window = sequence.Segment with { RowStart = 1000 };
        backend.AttentionBackward(deviceQ, bench.Source(dO), layer, window, dQ, dK.Tensor, dV.Tensor);

        (Matrix k, Matrix v) = (sequence.K[layer], sequence.V[layer]);
        (Matrix newDQ, Matrix newDK, Matrix newDV) = Reference.AttentionBackward(q, k, v, dO, start, shape);
        (Matrix absDQ, Matrix absDK, Matrix absDV) = Reference.AttentionBackwardMagnitude(q, k, v, dO, start, shape);
        double roundings = (2 * ScoreRoundings(sequence, layer)) + Expect.Roundings(shape.HeadDim, end, count * shape.Group);
        Expect.Close("dQ", dQ.Read(), newDQ, absDQ, roundings);
        VerifyAccumulator("dK", dK.Read(), oldDK, newDK, absDK, roundings);
        VerifyAccumulator("dV", dV.Read(), oldDV, newDV, absDV, roundings);
        bench.Verify();
    }

    /// <summary>A row that sees its own position alone returns its value, with the bits that the cache's type has, ties included.</summary>
    public static void Stored(IComputeBackend backend, DType kvType)
    {
        HeadShape shape = new(KvHeads: 2, Group: 1, HeadDim: 6);
        using var bench = new Workbench(backend);
        var cache = new PagedCache(bench, shape, blocks: 2);
        Matrix v = bench.Random(1, shape.KvColumns, 3);
        (v[0, 0], v[0, 1], v[0, 2]) = (1 + (1.0 / 256), 1 + (3.0 / 256), 6e-6f);
        (v[0, 3], v[0, 4]) = (-1 - (1.0 / 256), 1 + (1.0 / 256) + (1.0 / (1 << 20)));
        AttentionSegment segment = cache.Append(bench.Random(1, shape.KvColumns), v, 0);
        Operand o = bench.Output(1, shape.QueryColumns);
        backend.Attention(bench.Source(bench.Random(1, shape.QueryColumns)), o, 0, [segment]);
        Expect.SameBits("value", o.Read(), v.Rounded(kvType));
        bench.Verify();
    }

    private static void VerifyForward(Sequence[] sequences, int layer, Matrix o)
    {
        Matrix untouched = Matrix.Filled(1, o.Columns, 77);
        Expect.SameBits("row outside segments", o.Slice(0, 1), untouched);
        foreach (Sequence sequence in sequences)
        {
            (int row, int start, int count) = (sequence.Segment.RowStart, sequence.Part.Start, sequence.Part.Count);
            HeadShape shape = sequence.Shape;
            (Matrix k, Matrix v) = (sequence.K[layer], sequence.V[layer]);
            (Matrix expected, Matrix lse) = Reference.Attention(sequence.Q, k, v, start, shape);
            Matrix magnitude = Reference.Attention(sequence.Q, k, v.Abs(), start, shape).O;
            double scores = ScoreRoundings(sequence, layer);
            Expect.Close("attention", o.Slice(row, count), expected, magnitude, scores + Expect.Roundings(start + count));
            Expect.SameBits("row outside segments", o.Slice(row + count, 1), untouched);
            if (sequence.LogSumExp is not null)
            {
                Matrix stored = sequence.LogSumExp.Read();
                Matrix one = lse.Map(value => 1 + Math.Abs(value));
                Expect.Close("log-sum-exp", stored.Slice(start, count), lse, one, scores + Expect.Roundings(start + count));
                stored.SetRows(start, Nan(count, stored.Columns));
                Expect.SameBits("log-sum-exp of other positions", stored, Nan(stored.Rows, stored.Columns));
            }
        }
    }

    private static void VerifyAccumulator(
        string what, Matrix actual, Matrix before, Matrix added, Matrix magnitude, double roundings)
    {
        int end = added.Rows;
        Matrix old = before.Slice(0, end);
        Expect.Close(what, actual.Slice(0, end), old.Plus(added), old.Abs().Plus(magnitude), roundings);
        Expect.SameBits(
            $"{what} after the window", actual.Slice(end, actual.Rows - end), before.Slice(end, actual.Rows - end));
    }

    // A rounding of a score is an absolute error in the exponent, so a relative error of P; so is one of the log-sum-exp.
    private static double ScoreRoundings(Sequence sequence, int layer) =>
        2 * Expect.Roundings(sequence.Shape.HeadDim) *
        Reference.ScoreMagnitude(sequence.Q, sequence.K[layer], sequence.Part.Start, sequence.Shape);

    private static Matrix Nan(int rows, int columns) => Matrix.Filled(rows, columns, double.NaN);

    /// <summary>
    /// The host's side of one part: its keys and values for every layer from position 0, as given to the backend and as its cache should
    /// hold them, and its query rows.
    /// </summary>
    private sealed class Sequence
    {
        private readonly Workbench _bench;

        public Sequence(
            Workbench bench, PagedCache cache, Part part, int row, bool keepLogSumExp, double scale, int positions = 0)
        {
            (_bench, Part, Shape) = (bench, part, cache.Shape);
            int end = part.Start + part.Count;
            Given = new (Matrix K, Matrix V)[PagedCache.Layers];
            for (int layer = 0; layer < Given.Length; layer++)
            {
                Given[layer] = (bench.Random(end, Shape.KvColumns, scale), bench.Random(end, Shape.KvColumns));
            }

            K = [.. Given.Select(given => given.K.Rounded(cache.Device.Type))];
            V = [.. Given.Select(given => given.V.Rounded(cache.Device.Type))];
            Q = bench.Random(part.Count, Shape.QueryColumns, scale);
            LogSumExp = keepLogSumExp ? bench.Accumulator(Nan(Math.Max(end + 2, positions), Shape.QueryHeads)) : null;
            int[] table = cache.TakeTable(Math.Max(end, positions));
            Segment = new AttentionSegment(row, part.Count, part.Start, cache.Device, table, LogSumExp?.Tensor);
        }

        public Part Part { get; }

        public HeadShape Shape { get; }

        public (Matrix K, Matrix V)[] Given { get; }

        public Matrix[] K { get; }

        public Matrix[] V { get; }

        public Matrix Q { get; }

        public Operand? LogSumExp { get; }

        public AttentionSegment Segment { get; }

        public void AppendPrefix(int layer)
        {
            (Matrix k, Matrix v) = (Given[layer].K.Slice(0, Part.Start), Given[layer].V.Slice(0, Part.Start));
            AttentionSegment prefix = Segment with { RowStart = 0, RowCount = Part.Start, PositionStart = 0 };
            _bench.Backend.AppendKv(_bench.Source(k), _bench.Source(v), layer, [prefix]);
        }
    }
}
