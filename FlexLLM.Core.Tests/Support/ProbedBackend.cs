using FlexLLM.Backends;
using FlexLLM.Primitives;
using FlexLLM.Tests.Contracts;

namespace FlexLLM.Tests.Support;

/// <summary>Names every operation that an engine uses to a probe before it passes it on.</summary>
internal sealed class ProbedBackend(IComputeBackend inner, Action<string> probe) : DelegatingBackend(inner)
{
    public override void Synchronize()
    {
        probe(nameof(Synchronize));
        Inner.Synchronize();
    }

    public override DeviceTensor Allocate(int rows, int columns, TensorUse use = TensorUse.Exact)
    {
        probe(nameof(Allocate));
        return Inner.Allocate(rows, columns, use);
    }

    public override DeviceKvCache CreateKvCache(int layers, int blocks, int kvHeads, int headDim)
    {
        probe(nameof(CreateKvCache));
        return Inner.CreateKvCache(layers, blocks, kvHeads, headDim);
    }

    public override void ResizeKvCache(DeviceKvCache cache, int blocks)
    {
        probe(nameof(ResizeKvCache));
        Inner.ResizeKvCache(cache, blocks);
    }

    public override void ReserveScratch(in ScratchLimits limits)
    {
        probe(nameof(ReserveScratch));
        Inner.ReserveScratch(limits);
    }

    public override DeviceFactor CreateFactor(int innerSide, int wide)
    {
        probe(nameof(CreateFactor));
        return Inner.CreateFactor(innerSide, wide);
    }

    public override void RefreshFactor(DeviceFactor factor)
    {
        probe(nameof(RefreshFactor));
        Inner.RefreshFactor(factor);
    }

    public override void Upload(ReadOnlySpan<float> source, TensorSlice destination)
    {
        probe(nameof(Upload));
        Inner.Upload(source, destination);
    }

    public override void Download(TensorSlice source, Span<float> destination)
    {
        probe(nameof(Download));
        Inner.Download(source, destination);
    }

    public override void Copy(TensorSlice source, TensorSlice destination)
    {
        probe(nameof(Copy));
        Inner.Copy(source, destination);
    }

    public override void Zero(TensorSlice destination)
    {
        probe(nameof(Zero));
        Inner.Zero(destination);
    }

    public override void Linear(TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate)
    {
        probe(nameof(Linear));
        Inner.Linear(x, weight, bias, y, accumulate);
    }

    public override void LoraBypassBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx)
    {
        probe(nameof(LoraBypassBackward));
        Inner.LoraBypassBackward(x, dy, a, bTransposed, scale, gradA, gradBTransposed, dx);
    }

    public override void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate)
    {
        probe(nameof(Narrow));
        Inner.Narrow(x, m, scale, u, accumulate);
    }

    public override void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate)
    {
        probe(nameof(Widen));
        Inner.Widen(u, m, scale, y, accumulate);
    }

    public override void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient)
    {
        probe(nameof(AddOuter));
        Inner.AddOuter(u, x, scale, gradient);
    }

    public override void AddBias(TensorSlice y, DeviceTensor bias)
    {
        probe(nameof(AddBias));
        Inner.AddBias(y, bias);
    }

    public override void AddColumnSums(TensorSlice dy, DeviceTensor gradient)
    {
        probe(nameof(AddColumnSums));
        Inner.AddColumnSums(dy, gradient);
    }

    public override void ScaleColumns(TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate)
    {
        probe(nameof(ScaleColumns));
        Inner.ScaleColumns(x, gain, y, accumulate);
    }

    public override void ScaleColumnsBackward(
        TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate)
    {
        probe(nameof(ScaleColumnsBackward));
        Inner.ScaleColumnsBackward(x, dy, gain, gradGain, dx, accumulate);
    }

    public override void Pack(TensorSlice source, PackedFormat format, TensorSlice packed)
    {
        probe(nameof(Pack));
        Inner.Pack(source, format, packed);
    }

    public override void Unpack(TensorSlice packed, PackedFormat format, TensorSlice destination)
    {
        probe(nameof(Unpack));
        Inner.Unpack(packed, format, destination);
    }

    public override void Attention(TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments)
    {
        probe(nameof(Attention));
        Inner.Attention(q, o, layer, segments);
    }

    public override void AttentionBackward(
        TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK, DeviceTensor dV)
    {
        probe(nameof(AttentionBackward));
        Inner.AttentionBackward(q, dO, layer, window, dQ, dK, dV);
    }

    public override void Logits(TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits)
    {
        probe(nameof(Logits));
        Inner.Logits(x, rows, head, logits);
    }

    public override void ArgMax(TensorSlice x, Span<int> columns)
    {
        probe(nameof(ArgMax));
        Inner.ArgMax(x, columns);
    }

    public override void Largest(TensorSlice x, int count, Span<float> values, Span<int> columns)
    {
        probe(nameof(Largest));
        Inner.Largest(x, count, values, columns);
    }

    public override void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx, TensorSlice losses)
    {
        probe(nameof(FusedLinearCrossEntropy));
        Inner.FusedLinearCrossEntropy(x, targets, head, gradientScale, dx, losses);
    }

    public override void SgdStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options)
    {
        probe(nameof(SgdStep));
        Inner.SgdStep(parameter, gradient, velocity, options);
    }

    public override void AdamWStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2, in AdamWStepOptions options)
    {
        probe(nameof(AdamWStep));
        Inner.AdamWStep(parameter, gradient, moment1, moment2, options);
    }
}
