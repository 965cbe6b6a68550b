using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>One planted fault: takes a correct backend and the name of the fault, spoils one operation.</summary>
internal sealed partial class FaultyBackend(IComputeBackend inner, string fault) : DelegatingBackend(inner)
{
    public override long TensorBytes(int rows, int columns, TensorUse use = TensorUse.Exact) =>
        Inner.TensorBytes(fault == "tensors told a row short" ? Math.Max(0, rows - 1) : rows, columns, use);

    public override long FactorBytes(int inner, int wide) =>
        Inner.FactorBytes(inner, wide) - (fault == "factors told without a column" ? sizeof(float) : 0);

    public override long KvCacheBytes(int layers, int blocks, int kvHeads, int headDim) =>
        Inner.KvCacheBytes(fault == "one layer told for all" ? 1 : layers, blocks, kvHeads, headDim);

    public override void ResizeKvCache(DeviceKvCache cache, int blocks)
    {
        if (fault == "resize forgets the keys")
        {
            Inner.ResizeKvCache(cache, 0);
        }

        Inner.ResizeKvCache(cache, blocks);
    }

    public override unsafe DeviceWeight CreateWeight(in HostMatrix source, DType type)
    {
        if (fault != "BF16 truncated" || type != DType.BF16)
        {
            return Inner.CreateWeight(source, type);
        }

        float[] values = new float[source.Rows * source.Columns];
        for (int i = 0; i < values.Length; i++)
        {
            uint bits = BitConverter.SingleToUInt32Bits(source[i / source.Columns, i % source.Columns]);
            values[i] = BitConverter.UInt32BitsToSingle(bits & 0xFFFF0000);
        }

        fixed (float* data = values)
        {
            return Inner.CreateWeight(new HostMatrix((byte*)data, DType.F32, source.Rows, source.Columns), type);
        }
    }

    public override DeviceTensor Allocate(int rows, int columns, TensorUse use = TensorUse.Exact)
    {
        DeviceTensor tensor = Inner.Allocate(rows, columns, use);
        if (fault == "allocated memory is dirty" && rows > 0)
        {
            Inner.Upload([.. Enumerable.Repeat(1e-20f, columns)], tensor.Slice(rows - 1, 1));
        }

        return tensor;
    }

    public override void RefreshFactor(DeviceFactor factor)
    {
        Inner.RefreshFactor(factor);
        if (fault is "refresh takes stale values" or "refresh forgets a row")
        {
            Inner.Zero(factor.Values.Slice(0, 1));
        }
    }

    public override void Upload(ReadOnlySpan<float> source, TensorSlice destination)
    {
        Inner.Upload(source, destination);
        if (fault == "upload spills into the next row")
        {
            Spill(destination);
        }
    }

    public override void Download(TensorSlice source, Span<float> destination)
    {
        Inner.Download(source, destination);
        if (fault == "download flips a sign" && destination.Length > 7)
        {
            destination[7] = -destination[7];
        }
    }

    public override void Copy(TensorSlice source, TensorSlice destination)
    {
        bool drop = fault == "copy drops the last row" && source.Rows > 0;
        Inner.Copy(drop ? source.Slice(0, source.Rows - 1) : source, drop ? destination.Slice(0, source.Rows - 1) : destination);
        Quiet("copy changes a NaN", destination);
    }

    public override void Zero(TensorSlice destination)
    {
        Inner.Zero(destination);
        if (fault == "zero spills into the next row")
        {
            Spill(destination);
        }
    }

    public override void Gather(DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y) =>
        Inner.Gather(table, Shifted(ids, "gather reads the row before", -1), y);

    public override void RmsNorm(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y)
    {
        Inner.RmsNorm(x, gain, fault == "norm without epsilon" ? 0 : epsilon, y);
        Spoil("norm off by 1e-5", y);
    }

    public override void RmsNormBackward(
        TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate)
    {
        Inner.RmsNormBackward(x, gain, epsilon, dy, dx, accumulate && fault != "norm gradient overwrites");
        Spoil("norm gradient off by 1e-5", dx);
    }

    public override void Linear(TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate)
    {
        Inner.Linear(
            x, weight, fault == "linear forgets its bias" ? null : bias, y, accumulate && fault != "linear overwrites");
        Spoil("linear off by 1e-5", y);
        if (y.Rows > 1)
        {
            Spoil("linear depends on its company", y);
        }
    }

    public override void LinearBackwardInput(TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate)
    {
        Inner.LinearBackwardInput(dy, weight, dx, accumulate && fault != "linear gradient overwrites");
        Spoil("linear gradient off by 1e-5", dx);
    }

    public override void LoraBypass(TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y)
    {
        LoraSegment[] changed = segments.ToArray();
        for (int i = 0; i < changed.Length; i++)
        {
            changed[i] = fault switch
            {
                "lora scale off by 1e-5" => changed[i] with { Scale = changed[i].Scale * 1.00001f },
                "lora segment starts a row early" => changed[i] with
                {
                    RowStart = Math.Max(0, changed[i].RowStart - 1),
                    RowCount = changed[i].RowCount + 1,
                },
                "lora takes the first adapter" => changed[i] with { A = changed[0].A, BTransposed = changed[0].BTransposed },
                _ => changed[i],
            };
        }

        Inner.LoraBypass(x, changed, y);
    }

    public override void LoraBypassBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx)
    {
        if (fault == "lora gradients overwrite")
        {
            Inner.Zero(gradA);
        }

        if (fault == "lora gradients in ascending order")
        {
            for (int row = 0; row < x.Rows; row++)
            {
                Inner.LoraBypassBackward(
                    x.Slice(row, 1), dy.Slice(row, 1), a, bTransposed, scale, gradA, gradBTransposed, dx?.Slice(row, 1));
            }

            return;
        }

        scale = fault == "lora gradient without scale" ? 1 : scale;
        Inner.LoraBypassBackward(
            x, dy, a, bTransposed, scale, gradA, gradBTransposed, fault == "lora gradient without dx" ? null : dx);
    }

    public override void Rope(TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse) => Inner.Rope(
        x, Shifted(positions, "rope one position early", -1), table, inverse && fault != "rope never inverse");

    public override void AppendKv(TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        using DeviceTensor? rounded = fault == "values rounded to BF16" ? Rounded(v, DType.BF16) : null;
        v = rounded is null ? v : rounded;
        Inner.AppendKv(
            fault == "values stored as keys" ? v : k, v, fault == "one layer for all" ? 0 : layer,
            Changed(segments, "append one position late", segment =>
                segment.PositionStart == 0 ? segment : segment with { PositionStart = segment.PositionStart + 1 }));
    }

    public override void Attention(TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        ReadOnlySpan<AttentionSegment> changed = Changed(
            segments, "attention sees the next position", segment => segment with { PositionStart = segment.PositionStart + 1 });
        changed = Changed(
            changed, "attention misses its own position",
            segment => segment with { PositionStart = Math.Max(0, segment.PositionStart - 1) });
        changed = Changed(changed, "no log-sum-exp", segment => segment with { LogSumExp = null });
        int headDim = segments.Length == 0 ? 1 : segments[0].Cache.HeadDim;
        int kvHeads = segments.Length == 0 ? 1 : segments[0].Cache.KvHeads;
        bool swap = fault == "heads interleaved instead of grouped";
        if (swap)
        {
            Regroup(q, q, headDim, kvHeads, back: false);
            Regroup(o, o, headDim, kvHeads, back: false);
        }

        Inner.Attention(q, o, layer, changed);
        if (swap)
        {
            Regroup(q, q, headDim, kvHeads, back: true);
            Regroup(o, o, headDim, kvHeads, back: true);
        }

        Spoil("attention off by 1e-4", o, 1.0001);
        if (q.Rows > 1)
        {
            Spoil("attention depends on its company", o);
        }
    }

    public override void AttentionBackward(
        TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK,
        DeviceTensor dV)
    {
        if (fault == "key gradients overwrite")
        {
            Inner.Zero(dK.Slice(0, window.PositionStart + window.RowCount));
        }

        if (fault == "key gradients in ascending order")
        {
            for (int row = 0; row < q.Rows; row++)
            {
                AttentionSegment one = window with { PositionStart = window.PositionStart + row, RowCount = 1 };
                Inner.AttentionBackward(q.Slice(row, 1), dO.Slice(row, 1), layer, one, dQ.Slice(row, 1), dK, dV);
            }

            return;
        }

        bool early = fault == "window one position early" && window.PositionStart > 0;
        Inner.AttentionBackward(
            q, dO, layer, early ? window with { PositionStart = window.PositionStart - 1 } : window, dQ, dK, dV);
        Spoil("query gradient off by 1e-3", dQ, 1.001);
        if (fault == "value gradients after the window")
        {
            Inner.Zero(dV.Slice(dV.Rows - 1, 1));
        }
    }

    public override void SiluGate(TensorSlice gate, TensorSlice up, TensorSlice y)
    {
        bool swap = fault == "gate and up swapped";
        Inner.SiluGate(swap ? up : gate, swap ? gate : up, y);
    }

    public override void SiluGateBackward(
        TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp)
    {
        bool swap = fault == "gate gradients swapped";
        Inner.SiluGateBackward(gate, up, dy, swap ? dUp : dGate, swap ? dGate : dUp);
    }

    public override void Add(TensorSlice a, TensorSlice b, TensorSlice y) => Inner.Add(a, fault == "a plus a" ? a : b, y);

    public override void Logits(TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits) =>
        Inner.Logits(x, Shifted(rows, "logits of the row before", -1), head, logits);

    public override void ArgMax(TensorSlice x, Span<int> columns)
    {
        Inner.ArgMax(x, columns);
        foreach (ref int column in columns)
        {
            column = fault == "the last column chosen" && column == 0 ? x.Columns - 1 : column;
            column = fault == "a row of NaN has a largest" && column < 0 ? 0 : column;
        }
    }

    public override void Largest(TensorSlice x, int count, Span<float> values, Span<int> columns)
    {
        Inner.Largest(x, count, values, columns);
        for (int row = 0; row < x.Rows; row++)
        {
            int last = ((row + 1) * count) - 1;
            values[last] = fault == "the last of the largest is too small" ? values[last] - 1 : values[last];
            columns[last] = fault == "one of the largest twice" ? columns[last - 1] : columns[last];
            values[row * count] = fault == "numbers for a row of NaN" && float.IsNaN(values[row * count]) ? 1 : values[row * count];
        }
    }

    public override void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx,
        TensorSlice losses)
    {
        int[] labels = targets.ToArray();
        if (fault == "rows without a target count")
        {
            labels = [.. labels.Select(label => Math.Max(0, label))];
        }

        gradientScale = fault == "loss gradient not scaled" ? 1 : gradientScale;
        Inner.FusedLinearCrossEntropy(x, Shifted(labels, "target before", -1), head, gradientScale, dx, losses);
        if (fault == "losses scaled")
        {
            float[] last = new float[1];
            TensorSlice slice = losses.Slice(losses.Rows - 1, 1);
            Inner.Download(slice, last);
            Inner.Upload([last[0] * gradientScale], slice);
        }
    }

    public override void SgdStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options) =>
        Inner.SgdStep(parameter, gradient, velocity, fault switch
        {
            "sgd without nesterov" => options with { Nesterov = false },
            "sgd without decay" => options with { WeightDecay = 0 },
            _ => options,
        });

    public override void AdamWStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2,
        in AdamWStepOptions options) =>
        Inner.AdamWStep(parameter, gradient, moment1, moment2, fault switch
        {
            "adamw counts from zero" => options with { Step = options.Step + 1 },
            "adamw without decay" => options with { WeightDecay = 0 },
            _ => options,
        });

    private int[] Shifted(ReadOnlySpan<int> values, string when, int by) =>
        [.. values.ToArray().Select(value => fault == when && value > 0 ? value + by : value)];

    private ReadOnlySpan<AttentionSegment> Changed(
        ReadOnlySpan<AttentionSegment> segments, string when, Func<AttentionSegment, AttentionSegment> change) =>
        fault == when ? segments.ToArray().Select(change).ToArray() : segments;

    private void Spoil(string when, TensorSlice slice, double factor = 1.00001)
    {
        if (fault == when)
        {
            float[] values = new float[slice.Rows * slice.Columns];
            Inner.Download(slice, values);
            Inner.Upload(Array.ConvertAll(values, value => (float)(value * factor)), slice);
        }
    }

    private void Spill(TensorSlice slice)
    {
        if (slice.Start + slice.Rows < slice.Tensor.Rows)
        {
            Inner.Zero(slice.Tensor.Slice(slice.Start + slice.Rows, 1));
        }
    }

    // Head i of the grouped order is head (i % group) * kvHeads + i / group of the interleaved one.
    private void Regroup(TensorSlice from, TensorSlice to, int headDim, int kvHeads, bool back)
    {
        float[] values = new float[from.Rows * from.Columns];
        Inner.Download(from, values);
        float[] moved = new float[values.Length];
        int heads = from.Columns / headDim;
        int group = heads / kvHeads;
        for (int head = 0; head < from.Rows * heads; head++)
        {
            int other = (head / heads * heads) + (head % heads % group * kvHeads) + (head % heads / group);
            (int source, int target) = back ? (head, other) : (other, head);
            values.AsSpan(source * headDim, headDim).CopyTo(moved.AsSpan(target * headDim, headDim));
        }

        Inner.Upload(moved, to);
    }
}
