using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>
/// <see cref="Reference"/> behind the interface, rounded to F32 on every store: shows that the contract can be met, and
/// carries the planted faults. One row at a time and tokens in descending order, so it keeps the law of determinism too.
/// </summary>
internal sealed partial class ReferenceBackend : IComputeBackend
{
    public string Name => "reference";

    public long AllocatedBytes { get; private set; }

    public void Synchronize()
    {
    }

    public long TensorBytes(int rows, int columns, TensorUse use = TensorUse.Exact) => sizeof(float) * (long)rows * columns;

    public long WeightBytes(int outFeatures, int inFeatures, DType type) => sizeof(double) * (long)outFeatures * inFeatures;

    public long FactorBytes(int inner, int wide) => TensorBytes(inner, wide);

    public long KvCacheBytes(int layers, int blocks, int kvHeads, int headDim) =>
        2L * sizeof(double) * layers * blocks * DeviceKvCache.TokensPerBlock * kvHeads * headDim;

    public long ScratchBytes(in ScratchLimits limits) => 0;

    public void ReserveScratch(in ScratchLimits limits)
    {
        // Every result is an object of its own.
    }

    public DeviceTensor Allocate(int rows, int columns, TensorUse use = TensorUse.Exact) => new HostTensor(this, rows, columns);

    public DeviceTensor View(DeviceTensor owner, long offset, int rows, int columns) =>
        new HostTensor((HostTensor)owner, (int)offset, rows, columns);

    public DeviceWeight CreateWeight(in HostMatrix source, DType type)
    {
        var values = new Matrix(source.Rows, source.Columns);
        for (int row = 0; row < source.Rows; row++)
        {
            for (int column = 0; column < source.Columns; column++)
            {
                values[row, column] = source[row, column];
            }
        }

        return new HostWeight(this, values.Rounded(type), type);
    }

    public DeviceKvCache CreateKvCache(int layers, int blocks, int kvHeads, int headDim) =>
        new HostKvCache(this, layers, blocks, kvHeads, headDim);

    public void ResizeKvCache(DeviceKvCache cache, int blocks) => ((HostKvCache)cache).Resize(blocks);

    public DeviceFactor CreateFactor(int inner, int wide)
    {
        Check.That(inner > 0 && wide > 0);
        return new HostFactor(this, inner, wide);
    }

    public void RefreshFactor(DeviceFactor factor)
    {
        // Nothing is derived.
    }

    public void Upload(ReadOnlySpan<float> source, TensorSlice destination)
    {
        Check.That(source.Length == destination.Rows * destination.Columns);
        source.CopyTo(Floats(destination));
    }

    public void Download(TensorSlice source, Span<float> destination)
    {
        Check.That(destination.Length == source.Rows * source.Columns);
        Floats(source).CopyTo(destination);
    }

    // Not by way of numbers: those would lose the bits of some NaN.
    public void Copy(TensorSlice source, TensorSlice destination)
    {
        Check.That(SameShape(source, destination));
        Floats(source).CopyTo(Floats(destination));
    }

    public void Zero(TensorSlice destination) => Floats(destination).Clear();

    public void Gather(DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y) =>
        Store(Rows(Values(table), ids), y);

    public void RmsNorm(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y)
    {
        Check.That(gain.Rows == 1 && x.Columns % gain.Columns == 0);
        Store(Reference.RmsNorm(Read(x), Read(gain), epsilon), y);
    }

    public void RmsNormBackward(
        TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate)
    {
        Check.That(gain.Rows == 1 && x.Columns % gain.Columns == 0 && SameShape(x, dy));
        Store(Reference.RmsNormBackward(Read(x), Read(gain), epsilon, Read(dy)), dx, accumulate);
    }

    public void Linear(TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate)
    {
        Check.That(x.Columns == weight.InFeatures);
        Check.That(bias is null || (bias.Rows == 1 && bias.Columns == weight.OutFeatures));
        Store(Reference.Linear(Read(x), Values(weight), bias is null ? null : Read(bias)), y, accumulate);
    }

    public void LinearBackwardInput(TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate)
    {
        Check.That(dy.Columns == weight.OutFeatures);
        Store(Reference.LinearBackwardInput(Read(dy), Values(weight)), dx, accumulate);
    }

    public void LoraBypass(TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y)
    {
        Check.That(x.Rows == y.Rows);
        foreach (LoraSegment segment in segments)
        {
            (DeviceFactor a, DeviceFactor b) = (segment.A, segment.BTransposed);
            Check.That(x.Columns == a.Wide && y.Columns == b.Wide && a.Inner == b.Inner);
            Matrix rows = Read(x.Slice(segment.RowStart, segment.RowCount));
            Matrix add = Reference.LoraBypass(rows, Read(a.Values), Read(b.Values), segment.Scale);
            Store(add, y.Slice(segment.RowStart, segment.RowCount), accumulate: true);
        }
    }

    public void LoraBypassBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx)
    {
        Check.That(x.Rows == dy.Rows && x.Columns == a.Wide && dy.Columns == bTransposed.Wide && a.Inner == bTransposed.Inner);
        for (int row = x.Rows - 1; row >= 0; row--)
        {
            (Matrix newA, Matrix newB, Matrix d) = Reference.LoraBypassBackward(
                Read(x.Slice(row, 1)), Read(dy.Slice(row, 1)), Read(a.Values), Read(bTransposed.Values), scale);
            Store(newA, gradA, accumulate: true);
            Store(newB, gradBTransposed, accumulate: true);
            if (dx is TensorSlice slice)
            {
                Store(d, slice.Slice(row, 1), accumulate: true);
            }
        }
    }

    public void Rope(TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse)
    {
        Check.That(positions.Length == x.Rows && x.Columns % table.Columns == 0);
        Check.That(positions.IndexOfAnyExceptInRange(0, table.Rows - 1) < 0);
        Store(Reference.Rope(Read(x), positions.ToArray(), Read(table), inverse), x);
    }

    public void AppendKv(TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        foreach (AttentionSegment segment in segments)
        {
            var cache = (HostKvCache)segment.Cache;
            Check.That(k.Columns == cache.KvHeads * cache.HeadDim && SameShape(k, v));
            for (int i = 0; i < segment.RowCount; i++)
            {
                int slot = cache.Slot(layer, segment.BlockTable, segment.PositionStart + i);
                cache.Keys.SetRows(slot, Read(k.Slice(segment.RowStart + i, 1)));
                cache.Values.SetRows(slot, Read(v.Slice(segment.RowStart + i, 1)));
            }
        }
    }

    public void Attention(TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        Check.That(SameShape(q, o));
        foreach (AttentionSegment segment in segments)
        {
            var cache = (HostKvCache)segment.Cache;
            (int start, int count) = (segment.PositionStart, segment.RowCount);
            (Matrix k, Matrix v) = cache.Gather(layer, segment.BlockTable, start + count);
            Matrix rows = Read(q.Slice(segment.RowStart, count));
            (Matrix result, Matrix lse) = Reference.Attention(rows, k, v, start, cache.ShapeFor(q.Columns));
            Store(result, o.Slice(segment.RowStart, count));
            if (segment.LogSumExp is not null)
            {
                Store(lse, segment.LogSumExp.Slice(start, count));
            }
        }
    }

    public void AttentionBackward(
        TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK,
        DeviceTensor dV)
    {
        var cache = (HostKvCache)window.Cache;
        Check.That(q.Rows == window.RowCount && SameShape(q, dO));
        Check.That(SameShape(dK, dV) && dK.Columns == cache.KvHeads * cache.HeadDim);
        for (int row = q.Rows - 1; row >= 0; row--)
        {
            int position = window.PositionStart + row;
            (Matrix k, Matrix v) = cache.Gather(layer, window.BlockTable, position + 1);
            (Matrix rowDQ, Matrix rowDK, Matrix rowDV) = Reference.AttentionBackward(
                Read(q.Slice(row, 1)), k, v, Read(dO.Slice(row, 1)), position, cache.ShapeFor(q.Columns));
            Store(rowDQ, dQ.Slice(row, 1));
            Store(rowDK, dK.Slice(0, position + 1), accumulate: true);
            Store(rowDV, dV.Slice(0, position + 1), accumulate: true);
        }
    }

    public void SiluGate(TensorSlice gate, TensorSlice up, TensorSlice y)
    {
        Check.That(SameShape(gate, up));
        Store(Reference.SiluGate(Read(gate), Read(up)), y);
    }

    public void SiluGateBackward(
        TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp)
    {
        Check.That(SameShape(gate, up) && SameShape(gate, dy));
        (Matrix g, Matrix u) = Reference.SiluGateBackward(Read(gate), Read(up), Read(dy));
        Store(g, dGate);
        Store(u, dUp);
    }

    public void Add(TensorSlice a, TensorSlice b, TensorSlice y)
    {
        Check.That(SameShape(a, b));
        Store(Read(a).Plus(Read(b)), y);
    }

    public void Logits(TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits)
    {
        Check.That(x.Columns == head.InFeatures);
        Store(Reference.Linear(Rows(Read(x), rows), Values(head)), logits);
    }

    public void ArgMax(TensorSlice x, Span<int> columns)
    {
        Matrix values = Read(x);
        Check.That(columns.Length == values.Rows);
        Reference.ArgMax(values).CopyTo(columns);
    }

    public void Largest(TensorSlice x, int count, Span<float> values, Span<int> columns)
    {
        Matrix all = Read(x);
        for (int row = 0; row < all.Rows; row++)
        {
            int[] order = Reference.Order(all, row);
            for (int i = 0; i < count; i++)
            {
                (values[(row * count) + i], columns[(row * count) + i]) = ((float)all[row, order[i]], order[i]);
            }
        }
    }

    public void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx,
        TensorSlice losses)
    {
        Check.That(targets.Length == x.Rows && losses.Rows == x.Rows && losses.Columns == 1 && x.Columns == head.InFeatures);
        Check.That(targets.IndexOfAnyInRange(head.OutFeatures, int.MaxValue) < 0);
        (Matrix rows, int[] labels) = (Read(x), targets.ToArray());
        Store(Matrix.Column(Reference.CrossEntropy(rows, labels, Values(head))), losses);
        Store(Reference.CrossEntropyBackward(rows, labels, Values(head), gradientScale), dx);
    }

    public void SgdStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options)
    {
        Check.That(SameShape(parameter, gradient) && (velocity is null || SameShape(parameter, velocity)));
        (Matrix p, Matrix? v) = (Read(parameter), velocity is null ? null : Read(velocity));
        Reference.SgdStep(p, Read(gradient), v, options);
        Store(p, parameter);
        if (velocity is not null && v is not null)
        {
            Store(v, velocity);
        }
    }

    public void AdamWStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2,
        in AdamWStepOptions options)
    {
        Check.That(SameShape(parameter, gradient) && SameShape(parameter, moment1) && SameShape(parameter, moment2));
        (Matrix p, Matrix m, Matrix v) = (Read(parameter), Read(moment1), Read(moment2));
        Reference.AdamWStep(p, Read(gradient), m, v, options);
        Store(p, parameter);
        Store(m, moment1);
        Store(v, moment2);
    }

    public void Dispose()
    {
        // Tensors are managed memory and have owners.
    }

    private static Matrix Rows(Matrix values, ReadOnlySpan<int> rows)
    {
        Check.That(rows.IndexOfAnyExceptInRange(0, values.Rows - 1) < 0);
        return Reference.Gather(values, rows.ToArray());
    }

    private static Matrix Read(TensorSlice slice) => Matrix.FromFloats(slice.Rows, slice.Columns, Floats(slice));

    private static void Store(Matrix values, TensorSlice destination, bool accumulate = false)
    {
        Check.That(values.Rows == destination.Rows && values.Columns == destination.Columns);
        (accumulate ? Read(destination).Plus(values) : values).ToFloats().CopyTo(Floats(destination));
    }

    private static Span<float> Floats(TensorSlice slice) =>
        ((HostTensor)slice.Tensor).Data.Span.Slice(slice.Start * slice.Columns, slice.Rows * slice.Columns);

    private static Matrix Values(DeviceWeight weight) => ((HostWeight)weight).Values;

    private static bool SameShape(TensorSlice a, TensorSlice b) => a.Rows == b.Rows && a.Columns == b.Columns;

    private sealed class HostTensor : DeviceTensor
    {
        private readonly ReferenceBackend? _owner;

        public HostTensor(ReferenceBackend owner, int rows, int columns)
            : base(rows, columns)
        {
            _owner = owner;
            Data = new float[rows * columns];
            owner.AllocatedBytes += Bytes;
        }

        public HostTensor(HostTensor owner, int offset, int rows, int columns)
            : base(rows, columns) => Data = owner.Data.Slice(offset, rows * columns);

        public Memory<float> Data { get; }

        public override long Bytes => _owner is null ? 0 : sizeof(float) * (long)Data.Length;

        public override void Dispose()
        {
            if (_owner is not null)
            {
                _owner.AllocatedBytes -= Bytes;
            }
        }
    }

    private sealed class HostWeight : DeviceWeight
    {
        private readonly ReferenceBackend _owner;

        public HostWeight(ReferenceBackend owner, Matrix values, DType type)
            : base(values.Rows, values.Columns, type)
        {
            (_owner, Values) = (owner, values);
            owner.AllocatedBytes += Bytes;
        }

        public Matrix Values { get; }

        public override long Bytes => sizeof(double) * (long)Values.Values.Length;

        public override void Dispose() => _owner.AllocatedBytes -= Bytes;
    }

    private sealed class HostFactor(ReferenceBackend owner, int inner, int wide) : DeviceFactor(inner, wide)
    {
        public override DeviceTensor Values { get; } = owner.Allocate(inner, wide);

        public override long Bytes => Values.Bytes;

        public override void Dispose() => Values.Dispose();
    }

    private sealed class HostKvCache : DeviceKvCache
    {
        private readonly ReferenceBackend _owner;

        public HostKvCache(ReferenceBackend owner, int layers, int blocks, int kvHeads, int headDim)
            : base(layers, blocks, kvHeads, headDim)
        {
            _owner = owner;
            Keys = new Matrix(layers * blocks * TokensPerBlock, kvHeads * headDim);
            Values = new Matrix(Keys.Rows, Keys.Columns);
            owner.AllocatedBytes += Bytes;
        }

        public Matrix Keys { get; private set; }

        public Matrix Values { get; private set; }

        public override long Bytes => 2L * sizeof(double) * Keys.Values.Length;

        public int Slot(int layer, int[] table, int position)
        {
            Check.That(layer < Layers && position / TokensPerBlock < table.Length);
            int block = table[position / TokensPerBlock];
            Check.That(block >= 0 && block < Blocks);
            return (((layer * Blocks) + block) * TokensPerBlock) + (position % TokensPerBlock);
        }

        public void Resize(int blocks)
        {
            CheckResize(blocks);
            _owner.AllocatedBytes -= Bytes;
            Keys = Resized(Keys, blocks);
            Values = Resized(Values, blocks);
            Blocks = blocks;
            _owner.AllocatedBytes += Bytes;
        }

        public HeadShape ShapeFor(int queryColumns)
        {
            Check.That(queryColumns % (KvHeads * HeadDim) == 0);
            return new HeadShape(KvHeads, queryColumns / (KvHeads * HeadDim), HeadDim);
        }

        public (Matrix K, Matrix V) Gather(int layer, int[] table, int positions)
        {
            int[] slots = [.. Enumerable.Range(0, positions).Select(position => Slot(layer, table, position))];
            return (Reference.Gather(Keys, slots), Reference.Gather(Values, slots));
        }

        public override void Dispose() => _owner.AllocatedBytes -= Bytes;

        private Matrix Resized(Matrix from, int blocks)
        {
            int kept = Math.Min(Blocks, blocks) * TokensPerBlock;
            var to = new Matrix(Layers * blocks * TokensPerBlock, from.Columns);
            for (int layer = 0; layer < Layers; layer++)
            {
                to.SetRows(layer * blocks * TokensPerBlock, from.Slice(layer * Blocks * TokensPerBlock, kept));
            }

            return to;
        }
    }
}
