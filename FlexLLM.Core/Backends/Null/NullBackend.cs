using System.Runtime.CompilerServices;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Null;

/// <summary>
/// A device that checks shapes and counts bytes like a real one, computes nothing, and moves a clock by the time that a
/// given machine would take. What is downloaded are zeros and a single one, at a place that follows from seed and number of
/// the download; every loss is 1. With it a simulation runs the engine itself, thousands of steps a second.
/// </summary>
/// <param name="machine">Whose time it charges.</param>
/// <param name="clock">The clock that it moves, and nobody else during a call.</param>
/// <param name="seed">Seed of downloads and jitter.</param>
internal partial class NullBackend(NullMachine machine, ManualClock clock, ulong seed) : IComputeBackend
{
    private readonly NullMemory _memory = new();
    private SeededRandom _downloads = new(seed);
    private SeededRandom _jitter = new(~seed);
    private double _slowness = 1.0;
    private double _slownessSecondsLeft;
    private double _secondsOwed; // Less than a tick of the clock.

    public string Name => "null";

    public long AllocatedBytes => _memory.Bytes;

    /// <summary>Factor on every later call's time: a machine that throttles, or is shared.</summary>
    public double Slowdown { get; set; } = 1.0;

    /// <summary>Calls charged so far.</summary>
    public long Calls { get; private set; }

    public virtual void Synchronize()
    {
    }

    public long TensorBytes(int rows, int columns, TensorUse use = TensorUse.Exact) => NullTensor.BytesOf(rows, columns);

    public long WeightBytes(int outFeatures, int inFeatures, DType type) => NullWeight.BytesOf(outFeatures, inFeatures, type);

    public long FactorBytes(int inner, int wide) => NullTensor.BytesOf(inner, wide);

    public long KvCacheBytes(int layers, int blocks, int kvHeads, int headDim) =>
        NullKvCache.BytesOf(layers, blocks, kvHeads, headDim);

    public long ScratchBytes(in ScratchLimits limits) => 0; // What it does not compute needs no room.

    public void ReserveScratch(in ScratchLimits limits)
    {
    }

    public DeviceTensor Allocate(int rows, int columns, TensorUse use = TensorUse.Exact)
    {
        var tensor = new NullTensor(_memory, rows, columns);
        Charge(rows, 0, tensor.Bytes);
        return tensor;
    }

    public DeviceTensor View(DeviceTensor owner, long offset, int rows, int columns) =>
        new NullTensor((NullTensor)owner, offset, rows, columns);

    public DeviceWeight CreateWeight(in HostMatrix source, DType type)
    {
        Check.That(type is DType.F32 or DType.BF16);
        var weight = new NullWeight(_memory, source.Rows, source.Columns, type);
        Charge(source.Rows, 0, source.Bytes + weight.Bytes);
        return weight;
    }

    public DeviceKvCache CreateKvCache(int layers, int blocks, int kvHeads, int headDim) =>
        new NullKvCache(_memory, layers, blocks, kvHeads, headDim);

    public void ResizeKvCache(DeviceKvCache cache, int blocks) => ((NullKvCache)cache).Resize(blocks);

    public DeviceFactor CreateFactor(int inner, int wide)
    {
        Check.That(inner > 0 && wide > 0);
        var factor = new NullFactor(_memory, inner, wide);
        Charge(inner, 0, factor.Bytes);
        return factor;
    }

    public void RefreshFactor(DeviceFactor factor) => _ = BytesOf(factor); // There are no derived copies.

    public void Upload(ReadOnlySpan<float> source, TensorSlice destination)
    {
        Check.That(source.Length == (long)destination.Rows * destination.Columns);
        Charge(destination.Rows, 0, BytesOf(destination));
    }

    public void Download(TensorSlice source, Span<float> destination)
    {
        Check.That(destination.Length == (long)source.Rows * source.Columns);
        Charge(source.Rows, 0, BytesOf(source));
        destination.Clear();
        if (source.Columns == 1)
        {
            destination.Fill(1f); // A loss of one each, of rows without a target too: nobody learns in a simulation.
        }
        else if (!destination.IsEmpty)
        {
            destination[_downloads.Next(destination.Length)] = 1f;
        }
    }

    public void Copy(TensorSlice source, TensorSlice destination)
    {
        CheckAlike(source, destination);
        Charge(source.Rows, 0, BytesOf(source) + BytesOf(destination));
    }

    public void Zero(TensorSlice destination) => Charge(destination.Rows, 0, BytesOf(destination));

    public void Gather(DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y)
    {
        Check.That(ids.Length == y.Rows && y.Columns == table.InFeatures);
        foreach (int id in ids)
        {
            Check.That((uint)id < (uint)table.OutFeatures);
        }

        Check.That(BytesOf(table) > 0);
        Charge(y.Rows, 0, BytesOf(y) + (Elements(y) * DTypes.BytesOf(table.Type)));
    }

    public void RmsNorm(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y)
    {
        CheckAlike(x, y);
        CheckGain(gain, x);
        Charge(x.Rows, 4 * Elements(x), BytesOf(x) + BytesOf(gain) + BytesOf(y));
    }

    public void RmsNormBackward(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate)
    {
        CheckAlike(x, dy);
        CheckAlike(x, dx);
        CheckGain(gain, x);
        Charge(x.Rows, 9 * Elements(x), BytesOf(x) + BytesOf(gain) + BytesOf(dy) + Written(dx, accumulate));
    }

    public void Linear(TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate)
    {
        Check.That(x.Rows == y.Rows && x.Columns == weight.InFeatures && y.Columns == weight.OutFeatures);
        Check.That(bias is null || (bias.Rows == 1 && bias.Columns == y.Columns));
        long bytes = BytesOf(x) + BytesOf(weight) + (bias is null ? 0 : BytesOf(bias)) + Written(y, accumulate);
        Charge(x.Rows, 2 * Elements(x) * weight.OutFeatures, bytes);
    }

    public void LinearBackwardInput(TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate)
    {
        Check.That(dy.Rows == dx.Rows && dy.Columns == weight.OutFeatures && dx.Columns == weight.InFeatures);
        Charge(dy.Rows, 2 * Elements(dy) * weight.InFeatures, BytesOf(dy) + BytesOf(weight) + Written(dx, accumulate));
    }

    public void LoraBypass(TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y)
    {
        Check.That(x.Rows == y.Rows);
        int end = 0;
        int rows = 0;
        double flops = 0;
        double bytes = 0;
        foreach (LoraSegment segment in segments)
        {
            (DeviceFactor a, DeviceFactor b) = (segment.A, segment.BTransposed);
            Check.That(segment.RowStart >= end && segment.RowCount >= 0 && segment.RowStart + segment.RowCount <= x.Rows);
            Check.That(a.Wide == x.Columns && b.Wide == y.Columns && a.Inner == b.Inner);
            end = segment.RowStart + segment.RowCount;
            rows += segment.RowCount;
            flops += 2.0 * segment.RowCount * a.Inner * (a.Wide + b.Wide);
            bytes += BytesOf(a) + BytesOf(b) + BytesOf(x.Slice(segment.RowStart, segment.RowCount)) +
                Written(y.Slice(segment.RowStart, segment.RowCount), accumulate: true);
        }

        Charge(rows, flops, bytes);
    }

    public void LoraBypassBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx)
    {
        Check.That(x.Rows == dy.Rows && x.Columns == a.Wide && dy.Columns == bTransposed.Wide && a.Inner == bTransposed.Inner);
        CheckAlike(gradA, a.Values);
        CheckAlike(gradBTransposed, bTransposed.Values);
        double bytes = BytesOf(x) + BytesOf(dy) + BytesOf(a) + BytesOf(bTransposed) + Written(gradA, accumulate: true) +
            Written(gradBTransposed, accumulate: true);
        double products = (2 * Elements(x)) + (2 * Elements(dy)); // u and gradA read x, du and gradB read dy.
        if (dx is TensorSlice slice)
        {
            CheckAlike(x, slice);
            bytes += Written(slice, accumulate: true);
            products += Elements(slice);
        }

        Charge(x.Rows, 2 * products * a.Inner, bytes);
    }

    public void Rope(TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse)
    {
        Check.That(positions.Length == x.Rows);
        Check.That(table.Columns > 0 && table.Columns % 2 == 0 && x.Columns % table.Columns == 0);
        foreach (int position in positions)
        {
            Check.That((uint)position < (uint)table.Rows);
        }

        Check.That(BytesOf(table) > 0);
        Charge(x.Rows, 3 * Elements(x), Written(x, accumulate: true) + (4.0 * x.Rows * table.Columns));
    }

    public void AppendKv(TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        CheckAlike(k, v);
        int rows = 0;
        foreach (ref readonly AttentionSegment segment in segments)
        {
            CheckSegment(segment, layer, k.Rows);
            Check.That(k.Columns == segment.Cache.KvHeads * segment.Cache.HeadDim);
            rows += segment.RowCount;
        }

        Charge(rows, 0, 2.0 * (BytesOf(k) + BytesOf(v)) / Math.Max(1, k.Rows) * rows);
    }

    public void Attention(TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        CheckAlike(q, o);
        double flops = 0;
        double bytes = 0;
        int rows = 0;
        foreach (ref readonly AttentionSegment segment in segments)
        {
            CheckSegment(segment, layer, q.Rows);
            int queryHeads = CheckHeads(segment, q);
            int end = segment.PositionStart + segment.RowCount;
            DeviceTensor? lse = segment.LogSumExp;
            Check.That(lse is null || (lse.Rows >= end && lse.Columns == queryHeads && BytesOf(lse) >= 0));
            rows += segment.RowCount;
            flops += 4.0 * ContextOf(segment) * q.Columns; // Scores, and their sum of values.
            bytes += KvBytes(segment, end) + BytesOf(q.Slice(segment.RowStart, segment.RowCount)) +
                BytesOf(o.Slice(segment.RowStart, segment.RowCount));
        }

        Charge(rows, flops, bytes);
    }

    public void AttentionBackward(
        TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK, DeviceTensor dV)
    {
        CheckAlike(q, dO);
        CheckAlike(q, dQ);
        Check.That(q.Rows == window.RowCount);
        CheckSegment(window with { RowStart = 0 }, layer, q.Rows);
        int queryHeads = CheckHeads(window, q);
        int end = window.PositionStart + window.RowCount;
        Check.That(dK.Rows >= end && dK.Columns == window.Cache.KvHeads * window.Cache.HeadDim);
        CheckAlike(dK, dV);
        Check.That(window.LogSumExp is not null && window.LogSumExp.Rows >= end && window.LogSumExp.Columns == queryHeads);
        Check.That(BytesOf(window.LogSumExp) > 0);

        // Scores and dP again, then dV, dQ and dK: five products.
        double bytes = BytesOf(q) + BytesOf(dO) + BytesOf(dQ) + KvBytes(window, end) +
            Written(dK.Slice(0, end), accumulate: true) + Written(dV.Slice(0, end), accumulate: true);
        Charge(q.Rows, 10.0 * ContextOf(window) * q.Columns, bytes);
    }

    public void SiluGate(TensorSlice gate, TensorSlice up, TensorSlice y)
    {
        CheckAlike(gate, up);
        CheckAlike(gate, y);
        Charge(gate.Rows, 6 * Elements(gate), BytesOf(gate) + BytesOf(up) + BytesOf(y));
    }

    public void SiluGateBackward(TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp)
    {
        CheckAlike(gate, up);
        CheckAlike(gate, dy);
        CheckAlike(gate, dGate);
        CheckAlike(gate, dUp);
        double bytes = BytesOf(gate) + BytesOf(up) + BytesOf(dy) + BytesOf(dGate) + BytesOf(dUp);
        Charge(gate.Rows, 12 * Elements(gate), bytes);
    }

    public void Add(TensorSlice a, TensorSlice b, TensorSlice y)
    {
        CheckAlike(a, b);
        CheckAlike(a, y);
        Charge(a.Rows, Elements(a), BytesOf(a) + BytesOf(b) + BytesOf(y));
    }

    public void Logits(TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits)
    {
        Check.That(logits.Rows == rows.Length && logits.Columns == head.OutFeatures && x.Columns == head.InFeatures);
        foreach (int row in rows)
        {
            Check.That((uint)row < (uint)x.Rows);
        }

        Check.That(BytesOf(x) >= 0);
        double read = 4.0 * rows.Length * x.Columns;
        Charge(rows.Length, 2 * Elements(logits) * head.InFeatures, read + BytesOf(head) + BytesOf(logits));
    }

    // The place of the single one in each row that a download would have.
    public void ArgMax(TensorSlice x, Span<int> columns)
    {
        Check.That(columns.Length == x.Rows && x.Columns > 0);
        for (int i = 0; i < columns.Length; i++)
        {
            Charge(1, 0, BytesOf(x.Slice(i, 1)));
            columns[i] = _downloads.Next(x.Columns);
        }
    }

    // The single one, and zeros behind it.
    public void Largest(TensorSlice x, int count, Span<float> values, Span<int> columns)
    {
        Check.That(count > 0 && count <= x.Columns && values.Length == x.Rows * count && columns.Length == values.Length);
        values.Clear();
        for (int i = 0; i < x.Rows; i++)
        {
            Charge(1, 0, BytesOf(x.Slice(i, 1)));
            int largest = _downloads.Next(x.Columns);
            for (int k = 0; k < count; k++)
            {
                columns[(i * count) + k] = (largest + k) % x.Columns;
            }

            values[i * count] = 1f;
        }
    }

    public void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx, TensorSlice losses)
    {
        Check.That(targets.Length == x.Rows && losses.Rows == x.Rows && losses.Columns == 1 && x.Columns == head.InFeatures);
        CheckAlike(x, dx);
        int asked = 0;
        for (int i = 0; i < targets.Length; i++)
        {
            Check.That(targets[i] < head.OutFeatures);
            asked += targets[i] >= 0 ? 1 : 0;
        }

        // Logits and their gradient are a product each; softmax between them never leaves the chip.
        double products = (double)asked * x.Columns * head.OutFeatures;
        double bytes = BytesOf(dx) + (asked == 0 ? 0 : (2 * BytesOf(head)) + (4.0 * asked * x.Columns));
        Charge(x.Rows, (4 * products) + (6.0 * asked * head.OutFeatures), bytes);
    }

    public void SgdStep(DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options)
    {
        CheckAlike(parameter, gradient);
        Check.That(options.Momentum == 0 ? velocity is null : velocity is not null);
        double bytes = Written(parameter, accumulate: true) + BytesOf(gradient);
        if (velocity is not null)
        {
            CheckAlike(parameter, velocity);
            bytes += Written(velocity, accumulate: true);
        }

        Charge(parameter.Rows, 7 * Elements(parameter), bytes);
    }

    public void AdamWStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2, in AdamWStepOptions options)
    {
        CheckAlike(parameter, gradient);
        CheckAlike(parameter, moment1);
        CheckAlike(parameter, moment2);
        Check.That(options.Step >= 1);
        double bytes = Written(parameter, accumulate: true) + BytesOf(gradient) + Written(moment1, accumulate: true) +
            Written(moment2, accumulate: true);
        Charge(parameter.Rows, 14 * Elements(parameter), bytes);
    }

    public void Dispose() => GC.SuppressFinalize(this);

    /// <summary>
    /// Seconds of one call before jitter and slowdown. A simulation that knows the cost of whole steps charges them here instead.
    /// </summary>
    /// <param name="operation">Name of the method of <see cref="IComputeBackend"/> that was called.</param>
    /// <param name="flops">Floating-point operations.</param>
    /// <param name="bytes">Traffic to and from memory.</param>
    protected virtual double SecondsOf(string operation, double flops, double bytes)
    {
        double arithmetic = flops / machine.FlopsPerSecond;
        double traffic = bytes / machine.BytesPerSecond;
        double batch = operation == nameof(Gather) ? machine.SecondsPerBatch : 0; // Every batch starts with it.
        return batch + machine.SecondsPerCall + (machine.Overlaps ? Math.Max(arithmetic, traffic) : arithmetic + traffic);
    }

    /// <summary>
    /// What a call takes that should take so long, on a machine that is now faster, now slower: one chance for all of it, which those that
    /// follow within <see cref="NullMachine.JitterPeriod"/> share.
    /// </summary>
    protected virtual double ByChance(double seconds)
    {
        if (machine.Jitter > 0 && _slownessSecondsLeft <= 0)
        {
            _slowness = Math.Exp(machine.Jitter * _jitter.NextGaussian());
            _slownessSecondsLeft = machine.JitterPeriod.TotalSeconds;
        }

        seconds *= _slowness * Slowdown;
        _slownessSecondsLeft -= seconds;
        return seconds;
    }

    /// <summary>Moves the clock by the time of one call. A call without rows costs nothing.</summary>
    private void Charge(int rows, double flops, double bytes, [CallerMemberName] string operation = "")
    {
        double seconds = rows == 0 ? 0 : SecondsOf(operation, flops, bytes);
        if (seconds <= 0)
        {
            return;
        }

        _secondsOwed += ByChance(seconds);
        var whole = new TimeSpan((long)(_secondsOwed * TimeSpan.TicksPerSecond));
        _secondsOwed -= whole.TotalSeconds;
        clock.Advance(whole);
        Calls++;
    }

    private static long Elements(TensorSlice slice) => (long)slice.Rows * slice.Columns;

    // Bytes, of something that is there: reading what was disposed is a fault here as on a real device.
    private long BytesOf(TensorSlice slice)
    {
        Check.That(slice.Tensor is NullTensor { IsDisposed: false });
        return Elements(slice) * machine.ElementBytes;
    }

    private static long BytesOf(DeviceWeight weight)
    {
        Check.That(weight is NullWeight { IsDisposed: false });
        return weight.Bytes;
    }

    private static long BytesOf(DeviceFactor factor)
    {
        Check.That(factor is NullFactor { IsDisposed: false });
        return factor.Bytes;
    }

    /// <summary>Traffic of a destination, which is read first where the call adds to it.</summary>
    private long Written(TensorSlice slice, bool accumulate) => BytesOf(slice) * (accumulate ? 2 : 1);

    /// <summary>Keys and values of the first positions, in one layer.</summary>
    private double KvBytes(in AttentionSegment segment, int positions) =>
        2.0 * positions * segment.Cache.KvHeads * segment.Cache.HeadDim * machine.ElementBytes;

    /// <summary>Positions that the rows of a segment attend, summed: the row at position t attends t + 1.</summary>
    private static double ContextOf(in AttentionSegment segment) =>
        segment.RowCount * (segment.PositionStart + ((segment.RowCount + 1) / 2.0));

    private static void CheckAlike(TensorSlice a, TensorSlice b) => Check.That(a.Rows == b.Rows && a.Columns == b.Columns);

    private static void CheckGain(DeviceTensor gain, TensorSlice x) =>
        Check.That(gain.Rows == 1 && gain.Columns > 0 && x.Columns % gain.Columns == 0);

    private static int CheckHeads(in AttentionSegment segment, TensorSlice q)
    {
        int queryHeads = q.Columns / segment.Cache.HeadDim;
        Check.That(queryHeads > 0 && queryHeads * segment.Cache.HeadDim == q.Columns && queryHeads % segment.Cache.KvHeads == 0);
        return queryHeads;
    }

    private static void CheckSegment(in AttentionSegment segment, int layer, int rows)
    {
        Check.That(segment.Cache is NullKvCache { IsDisposed: false });
        Check.That((uint)layer < (uint)segment.Cache.Layers);
        Check.That(segment.RowStart >= 0 && segment.RowCount >= 0 && segment.RowStart + segment.RowCount <= rows);
        Check.That(segment.PositionStart >= 0);
        int tokens = segment.PositionStart + segment.RowCount;
        int blocks = (tokens + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock;
        Check.That(segment.BlockTable.Length >= blocks);
        foreach (int block in segment.BlockTable.AsSpan(0, blocks))
        {
            Check.That((uint)block < (uint)segment.Cache.Blocks);
        }
    }
}
