using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>Passes everything on: the base of backends with one planted fault.</summary>
internal abstract class DelegatingBackend(IComputeBackend inner) : IComputeBackend
{
    public string Name => inner.Name;

    public long AllocatedBytes => inner.AllocatedBytes;

    public virtual long? MemoryBytes => inner.MemoryBytes;

    public virtual string? PeerKind => inner.PeerKind;

    public virtual void Synchronize() => inner.Synchronize();

    protected IComputeBackend Inner => inner;

    public virtual bool IsOutOfMemory(Exception fault) => inner.IsOutOfMemory(fault);

    public virtual long TensorBytes(int rows, int columns, TensorUse use = TensorUse.Exact) => inner.TensorBytes(rows, columns, use);

    public virtual long WeightBytes(int outFeatures, int inFeatures, DType type) =>
        inner.WeightBytes(outFeatures, inFeatures, type);

    public virtual long FactorBytes(int inner, int wide) => Inner.FactorBytes(inner, wide);

    public virtual long KvCacheBytes(int layers, int blocks, int kvHeads, int headDim) =>
        inner.KvCacheBytes(layers, blocks, kvHeads, headDim);

    public virtual long ScratchBytes(in ScratchLimits limits) => inner.ScratchBytes(limits);

    public virtual void ReserveScratch(in ScratchLimits limits) => inner.ReserveScratch(limits);

    public virtual DeviceTensor Allocate(int rows, int columns, TensorUse use = TensorUse.Exact) => inner.Allocate(rows, columns, use);

    public virtual DeviceTensor View(DeviceTensor owner, long offset, int rows, int columns) =>
        inner.View(owner, offset, rows, columns);

    public virtual DeviceWeight CreateWeight(in HostMatrix source, DType type) => inner.CreateWeight(source, type);

    public virtual DeviceKvCache CreateKvCache(int layers, int blocks, int kvHeads, int headDim) =>
        inner.CreateKvCache(layers, blocks, kvHeads, headDim);

    public virtual void ResizeKvCache(DeviceKvCache cache, int blocks) => inner.ResizeKvCache(cache, blocks);

    public virtual DeviceFactor CreateFactor(int innerSide, int wide) => inner.CreateFactor(innerSide, wide);

    public virtual void RefreshFactor(DeviceFactor factor) => inner.RefreshFactor(factor);

    public virtual void Upload(ReadOnlySpan<float> source, TensorSlice destination) => inner.Upload(source, destination);

    public virtual void Download(TensorSlice source, Span<float> destination) => inner.Download(source, destination);

    public virtual void Copy(TensorSlice source, TensorSlice destination) => inner.Copy(source, destination);

    public virtual void ReadPeer(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate) =>
        inner.ReadPeer(source, from, destination, to, accumulate);

    public virtual void Zero(TensorSlice destination) => inner.Zero(destination);

    public virtual void Gather(DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y) => inner.Gather(table, ids, y);

    public virtual void RmsNorm(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y) =>
        inner.RmsNorm(x, gain, epsilon, y);

    public virtual void RmsNormBackward(
        TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate) =>
        inner.RmsNormBackward(x, gain, epsilon, dy, dx, accumulate);

    public virtual void Linear(TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate) =>
        inner.Linear(x, weight, bias, y, accumulate);

    public virtual void LinearBackwardInput(TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate) =>
        inner.LinearBackwardInput(dy, weight, dx, accumulate);

    public virtual void LoraBypass(TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y) =>
        inner.LoraBypass(x, segments, y);

    public virtual void LoraBypassBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx) =>
        inner.LoraBypassBackward(x, dy, a, bTransposed, scale, gradA, gradBTransposed, dx);

    public virtual void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate) =>
        inner.Narrow(x, m, scale, u, accumulate);

    public virtual void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate) =>
        inner.Widen(u, m, scale, y, accumulate);

    public virtual void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient) =>
        inner.AddOuter(u, x, scale, gradient);

    public virtual void AddBias(TensorSlice y, DeviceTensor bias) => inner.AddBias(y, bias);

    public virtual void AddColumnSums(TensorSlice dy, DeviceTensor gradient) => inner.AddColumnSums(dy, gradient);

    public virtual void ScaleColumns(TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate) =>
        inner.ScaleColumns(x, gain, y, accumulate);

    public virtual void ScaleColumnsBackward(
        TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate) =>
        inner.ScaleColumnsBackward(x, dy, gain, gradGain, dx, accumulate);

    public virtual void CopyColumns(
        TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns) =>
        inner.CopyColumns(source, sourceColumn, destination, destinationColumn, columns);

    public virtual void Relu(TensorSlice x, TensorSlice y) => inner.Relu(x, y);

    public virtual void ReluBackward(TensorSlice y, TensorSlice dy, TensorSlice dx) => inner.ReluBackward(y, dy, dx);

    public virtual void Silu(TensorSlice x, TensorSlice y) => inner.Silu(x, y);

    public virtual void SiluBackward(TensorSlice x, TensorSlice dy, TensorSlice dx) => inner.SiluBackward(x, dy, dx);

    public virtual void Pack(TensorSlice source, PackedFormat format, TensorSlice packed) => inner.Pack(source, format, packed);

    public virtual void Unpack(TensorSlice packed, PackedFormat format, TensorSlice destination) =>
        inner.Unpack(packed, format, destination);

    public virtual void Rope(TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse) =>
        inner.Rope(x, positions, table, inverse);

    public virtual void AppendKv(TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments) =>
        inner.AppendKv(k, v, layer, segments);

    public virtual void Attention(TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments) =>
        inner.Attention(q, o, layer, segments);

    public virtual void AttentionBackward(
        TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK,
        DeviceTensor dV) =>
        inner.AttentionBackward(q, dO, layer, window, dQ, dK, dV);

    public virtual void SiluGate(TensorSlice gate, TensorSlice up, TensorSlice y) => inner.SiluGate(gate, up, y);

    public virtual void SiluGateBackward(
        TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp) =>
        inner.SiluGateBackward(gate, up, dy, dGate, dUp);

    public virtual void Add(TensorSlice a, TensorSlice b, TensorSlice y) => inner.Add(a, b, y);

    public virtual void Logits(TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits) =>
        inner.Logits(x, rows, head, logits);

    public virtual void ArgMax(TensorSlice x, Span<int> columns) => inner.ArgMax(x, columns);

    public virtual void Largest(TensorSlice x, int count, Span<float> values, Span<int> columns) =>
        inner.Largest(x, count, values, columns);

    public virtual void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx,
        TensorSlice losses) =>
        inner.FusedLinearCrossEntropy(x, targets, head, gradientScale, dx, losses);

    public virtual void SgdStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options) =>
        inner.SgdStep(parameter, gradient, velocity, options);

    public virtual void AdamWStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2,
        in AdamWStepOptions options) =>
        inner.AdamWStep(parameter, gradient, moment1, moment2, options);

    public void Dispose() => inner.Dispose();

    /// <summary>A tensor of these rows, each number the nearest of the type.</summary>
    protected DeviceTensor Rounded(TensorSlice rows, DType type)
    {
        float[] values = new float[rows.Rows * rows.Columns];
        Inner.Download(rows, values);
        DeviceTensor rounded = Inner.Allocate(rows.Rows, rows.Columns);
        Inner.Upload(Matrix.FromFloats(rows.Rows, rows.Columns, values).Rounded(type).ToFloats(), rounded);
        return rounded;
    }
}
