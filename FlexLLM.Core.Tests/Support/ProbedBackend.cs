using FlexLLM.Backends;
using FlexLLM.Tests.Contracts;

namespace FlexLLM.Tests.Support;

/// <summary>Names every operation that an engine uses to a probe before it passes it on.</summary>
internal sealed class ProbedBackend(IComputeBackend inner, Action<string> probe) : DelegatingBackend(inner)
{
    public override DeviceTensor Allocate(int rows, int columns)
    {
        probe(nameof(Allocate));
        return Inner.Allocate(rows, columns);
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

    public override DeviceLora CreateLora(int inFeatures, int outFeatures, int rank)
    {
        probe(nameof(CreateLora));
        return Inner.CreateLora(inFeatures, outFeatures, rank);
    }

    public override void RefreshLora(DeviceLora lora)
    {
        probe(nameof(RefreshLora));
        Inner.RefreshLora(lora);
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
        TensorSlice x, TensorSlice dy, DeviceLora lora, float scale, DeviceTensor gradA, DeviceTensor gradBTransposed,
        TensorSlice? dx)
    {
        probe(nameof(LoraBypassBackward));
        Inner.LoraBypassBackward(x, dy, lora, scale, gradA, gradBTransposed, dx);
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

    public override void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx, Span<float> losses)
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
