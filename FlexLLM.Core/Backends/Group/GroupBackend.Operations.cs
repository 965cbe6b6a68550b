using FlexLLM.Primitives;

namespace FlexLLM.Backends.Group;

/// <summary>Each operation is the same one on every rank's parts.</summary>
internal sealed partial class GroupBackend
{
    private int[] _numbers = [];
    private AttentionSegment[] _segments = [];
    private AttentionSegment[][] _segmentParts = [];

    public void RefreshFactor(DeviceFactor factor) => Note(r => r.Device.RefreshFactor(r.Of(factor)));

    public void Copy(TensorSlice source, TensorSlice destination) => Note(r => r.Device.Copy(r.Of(source), r.Of(destination)));

    public void Zero(TensorSlice destination) => Note(r => r.Device.Zero(r.Of(destination)));

    public void Gather(DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y)
    {
        int[] kept = Keep(ids);
        Note(r => r.Device.Gather(r.Of(table), kept, r.Of(y)));
    }

    public void RmsNorm(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y) =>
        Note(r => r.Device.RmsNorm(r.Of(x), r.Of(gain), epsilon, r.Of(y)));

    public void RmsNormBackward(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate) =>
        Note(r => r.Device.RmsNormBackward(r.Of(x), r.Of(gain), epsilon, r.Of(dy), r.Of(dx), accumulate));

    public void Linear(TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate) =>
        Note(r => r.Device.Linear(r.Of(x), r.Of(weight), r.OfAny(bias), r.Of(y), accumulate));

    public void LinearBackwardInput(TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate) =>
        Note(r => r.Device.LinearBackwardInput(r.Of(dy), r.Of(weight), r.Of(dx), accumulate));

    public void LoraBypass(TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y)
    {
        LoraSegment[] kept = segments.ToArray();
        Note(r => r.Device.LoraBypass(r.Of(x), Array.ConvertAll(kept, r.Of), r.Of(y)));
    }

    public void LoraBypassBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx) =>
        Note(r => r.Device.LoraBypassBackward(
            r.Of(x), r.Of(dy), r.Of(a), r.Of(bTransposed), scale, r.Of(gradA), r.Of(gradBTransposed), r.Of(dx)));

    public void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate) =>
        Note(r => r.Device.Narrow(r.Of(x), r.Of(m), scale, r.Of(u), accumulate));

    public void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate) =>
        Note(r => r.Device.Widen(r.Of(u), r.Of(m), scale, r.Of(y), accumulate));

    public void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient) =>
        Note(r => r.Device.AddOuter(r.Of(u), r.Of(x), scale, r.Of(gradient)));

    public void AddBias(TensorSlice y, DeviceTensor bias) => Note(r => r.Device.AddBias(r.Of(y), r.Of(bias)));

    public void AddColumnSums(TensorSlice dy, DeviceTensor gradient) => Note(r => r.Device.AddColumnSums(r.Of(dy), r.Of(gradient)));

    public void ScaleColumns(TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate) =>
        Note(r => r.Device.ScaleColumns(r.Of(x), r.Of(gain), r.Of(y), accumulate));

    public void ScaleColumnsBackward(
        TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate) =>
        Note(r => r.Device.ScaleColumnsBackward(r.Of(x), r.Of(dy), r.Of(gain), r.Of(gradGain), r.Of(dx), accumulate));

    public void CopyColumns(TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns) =>
        Note(r => r.Device.CopyColumns(r.Of(source), sourceColumn, r.Of(destination), destinationColumn, columns));

    public void Relu(TensorSlice x, TensorSlice y) => Note(r => r.Device.Relu(r.Of(x), r.Of(y)));

    public void ReluBackward(TensorSlice y, TensorSlice dy, TensorSlice dx) =>
        Note(r => r.Device.ReluBackward(r.Of(y), r.Of(dy), r.Of(dx)));

    public void Silu(TensorSlice x, TensorSlice y) => Note(r => r.Device.Silu(r.Of(x), r.Of(y)));

    public void SiluBackward(TensorSlice x, TensorSlice dy, TensorSlice dx) =>
        Note(r => r.Device.SiluBackward(r.Of(x), r.Of(dy), r.Of(dx)));

    public void Pack(TensorSlice source, PackedFormat format, TensorSlice packed) =>
        Note(r => r.Device.Pack(r.Of(source), format, r.Of(packed)));

    public void Unpack(TensorSlice packed, PackedFormat format, TensorSlice destination) =>
        Note(r => r.Device.Unpack(r.Of(packed), format, r.Of(destination)));

    public void Rope(TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse)
    {
        int[] kept = Keep(positions);
        Note(r => r.Device.Rope(r.Of(x), kept, r.Of(table), inverse));
    }

    public void AppendKv(TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        AttentionSegment[][] kept = Keep(segments);
        Note(r => r.Device.AppendKv(r.Of(k), r.Of(v), layer, kept[r.Index]));
    }

    public void Attention(TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        AttentionSegment[][] kept = Keep(segments);
        Note(r => r.Device.Attention(r.Of(q), r.Of(o), layer, kept[r.Index]));
    }

    public void AttentionBackward(
        TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK, DeviceTensor dV)
    {
        AttentionSegment kept = window;
        Note(r => r.Device.AttentionBackward(r.Of(q), r.Of(dO), layer, r.Of(kept), r.Of(dQ), r.Of(dK), r.Of(dV)));
    }

    public void SiluGate(TensorSlice gate, TensorSlice up, TensorSlice y) =>
        Note(r => r.Device.SiluGate(r.Of(gate), r.Of(up), r.Of(y)));

    public void SiluGateBackward(TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp) =>
        Note(r => r.Device.SiluGateBackward(r.Of(gate), r.Of(up), r.Of(dy), r.Of(dGate), r.Of(dUp)));

    public void Add(TensorSlice a, TensorSlice b, TensorSlice y) => Note(r => r.Device.Add(r.Of(a), r.Of(b), r.Of(y)));

    public void Logits(TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits)
    {
        int[] kept = Keep(rows);
        Note(r => r.Device.Logits(r.Of(x), kept, r.Of(head), r.Of(logits)));
    }

    /// <summary>Of what rank 0 has.</summary>
    public void ArgMax(TensorSlice x, Span<int> columns)
    {
        GroupRank first = Settle()[0];
        first.Device.ArgMax(first.Of(x), columns);
    }

    /// <summary>Of what rank 0 has.</summary>
    public void Largest(TensorSlice x, int count, Span<float> values, Span<int> columns)
    {
        GroupRank first = Settle()[0];
        first.Device.Largest(first.Of(x), count, values, columns);
    }

    public void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx, TensorSlice losses)
    {
        int[] kept = Keep(targets);
        Note(r => r.Device.FusedLinearCrossEntropy(r.Of(x), kept, r.Of(head), gradientScale, r.Of(dx), r.Of(losses)));
    }

    public void SgdStep(DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options)
    {
        SgdStepOptions kept = options;
        Note(r => r.Device.SgdStep(r.Of(parameter), r.Of(gradient), r.OfAny(velocity), kept));
    }

    public void AdamWStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2, in AdamWStepOptions options)
    {
        AdamWStepOptions kept = options;
        Note(r => r.Device.AdamWStep(r.Of(parameter), r.Of(gradient), r.Of(moment1), r.Of(moment2), kept));
    }

    // Layer after layer asks with the same positions and segments: one copy serves them all.
    private int[] Keep(ReadOnlySpan<int> numbers) =>
        numbers.SequenceEqual(_numbers) ? _numbers : _numbers = numbers.ToArray();

    private AttentionSegment[][] Keep(ReadOnlySpan<AttentionSegment> segments)
    {
        if (!segments.SequenceEqual(_segments))
        {
            _segments = segments.ToArray();
            _segmentParts = [.. _ranks.Select(rank => Array.ConvertAll(_segments, rank.Of))];
        }

        return _segmentParts;
    }
}
