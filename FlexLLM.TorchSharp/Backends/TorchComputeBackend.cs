using FlexLLM.Primitives;
using TorchSharp;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// The waist on libtorch, through TorchSharp's managed API and without autograd: weights, KV cache and activations F32 or BF16, all else
/// F32, every gradient by its formula. It promises values, not bits: libtorch chooses the order of its sums by shape and machine.
/// </summary>
/// <remarks>
/// Temporaries come from libtorch's allocator and are returned at the end of the call that made them: <see cref="ScratchBytes"/> bounds
/// them, and what is reserved is counted in <see cref="AllocatedBytes"/> beside what outlives a call.
/// </remarks>
/// <param name="device">Where tensors live.</param>
/// <param name="elementsMax">See <see cref="TorchContext.ElementsMax"/>.</param>
/// <param name="indicesKept">Most index tensors that are kept for the next layer: see <see cref="KeptIndices"/>.</param>
/// <param name="kvType">See <see cref="TorchContext.KvType"/>.</param>
/// <param name="bytesFree">Tells the bytes that are free on the device; null where its memory is the host's.</param>
/// <param name="gpu">Which model of GPU it is; null on the host, or where nobody knows.</param>
/// <param name="multipliesBf16">See <see cref="TorchContext.MultipliesBf16"/>; null is what suits the device.</param>
/// <param name="activationType">See <see cref="TorchContext.ActivationType"/>.</param>
internal sealed class TorchComputeBackend(
    torch.Device device, long elementsMax = TorchContext.ElementsMaxDefault, int indicesKept = KeptIndices.CountDefault,
    DType kvType = DType.F32, Func<long>? bytesFree = null, string? gpu = null, bool? multipliesBf16 = null,
    DType activationType = DType.F32) : IComputeBackend
{
    private readonly TorchContext _context = new(device, elementsMax, indicesKept, kvType, gpu, multipliesBf16, activationType);

    // Asked once, before anything is allocated: what the engine itself holds later is not missing.
    private readonly Lazy<long>? _bytesFree = bytesFree is null ? null : new(bytesFree);
    private long _scratchBytes;

    public string Name => _context.Name;

    public long AllocatedBytes => _context.Memory.Bytes;

    public long? MemoryBytes => _bytesFree?.Value;

    public void Synchronize() => _context.Synchronize();

    /// <inheritdoc cref="TorchContext.IndexUploads"/>
    public long IndexUploads => _context.IndexUploads;

    /// <inheritdoc cref="SharedRounding.Count"/>
    public long Roundings => _context.Rounding.Count;

    // Between the memories of host and GPU a copy waits on the host, as one by way of the host does. Copies keep bits in one type alone.
    public string? PeerKind =>
        $"torch {(_context.OnHost ? "cpu" : "cuda")}{(_context.ActivationType == DType.F32 ? "" : $" {_context.ActivationType}")}";

    public bool IsOutOfMemory(Exception fault) => MemoryFault.Is(fault);

    public long TensorBytes(int rows, int columns, TensorUse use = TensorUse.Exact) => TorchTensor.BytesOf(rows, columns, TypeOf(use));

    public long WeightBytes(int outFeatures, int inFeatures, DType type) => TorchWeight.BytesOf(outFeatures, inFeatures, type);

    public long FactorBytes(int inner, int wide) => TorchTensor.BytesOf(inner, wide);

    public long KvCacheBytes(int layers, int blocks, int kvHeads, int headDim) =>
        TorchKvCache.BytesOf(layers, blocks, kvHeads, headDim, _context.KvType);

    public long ScratchBytes(in ScratchLimits limits) => TorchScratch.BytesOf(_context, limits);

    public void ReserveScratch(in ScratchLimits limits)
    {
        long bytes = ScratchBytes(limits);
        if (bytes >= _scratchBytes)
        {
            // Taken once, so that a device without it says so here. libtorch keeps it for whoever allocates next: the temporaries to come,
            // where all that lives longer was there before.
            try
            {
                OwnedMemory.Matrix(_context, 1, (bytes + sizeof(float) - 1) / sizeof(float), DType.F32).Dispose();
            }
            catch (OutOfMemoryException) when (bytes == _scratchBytes)
            {
                // It was promised before; temporaries take what there is.
            }
        }

        _context.Fit(limits);
        _context.Memory.Add(bytes - _scratchBytes);
        _scratchBytes = bytes;
    }

    public DeviceTensor Allocate(int rows, int columns, TensorUse use = TensorUse.Exact) => use switch
    {
        TensorUse.PackedBF16 => new TorchPacked(_context, rows, columns, PackedFormat.BF16),
        TensorUse.PackedSignBits => new TorchPacked(_context, rows, columns, PackedFormat.SignBits),
        _ => new TorchTensor(_context, rows, columns, TypeOf(use)),
    };

    public DeviceTensor View(DeviceTensor owner, long offset, int rows, int columns) =>
        new TorchTensor((TorchTensor)owner, offset, rows, columns);

    public DeviceWeight CreateWeight(in HostMatrix source, DType type) => new TorchWeight(_context, source, type);

    public DeviceKvCache CreateKvCache(int layers, int blocks, int kvHeads, int headDim) =>
        new TorchKvCache(_context, layers, blocks, kvHeads, headDim);

    public void ResizeKvCache(DeviceKvCache cache, int blocks) => ((TorchKvCache)cache).Resize(blocks);

    public DeviceFactor CreateFactor(int inner, int wide) => new TorchFactor(_context, inner, wide);

    public void RefreshFactor(DeviceFactor factor)
    {
        // Nothing is derived.
    }

    public void Upload(ReadOnlySpan<float> source, TensorSlice destination) => _context.Upload(source, destination);

    public void Download(TensorSlice source, Span<float> destination) => _context.Download(source, destination);

    public void Copy(TensorSlice source, TensorSlice destination) => ElementwiseOps.Copy(source, destination);

    public void ReadPeer(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate) =>
        PeerOps.Read(_context, source, from, destination, to, accumulate);

    public void Zero(TensorSlice destination) => ElementwiseOps.Zero(destination);

    public void Gather(DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y) => LinearOps.Gather(_context, table, ids, y);

    public void RmsNorm(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y) =>
        RowOps.RmsNorm(_context, x, gain, epsilon, y);

    public void RmsNormBackward(
        TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate) =>
        RowOps.RmsNormBackward(_context, x, gain, epsilon, dy, dx, accumulate);

    public void Linear(TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate) =>
        LinearOps.Forward(_context, x, weight, bias, y, accumulate);

    public void LinearBackwardInput(TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate) =>
        LinearOps.BackwardInput(_context, dy, weight, dx, accumulate);

    public void LoraBypass(TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y) =>
        FactorOps.LoraForward(_context, x, segments, y);

    public void LoraBypassBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx) =>
        FactorOps.LoraBackward(x, dy, a, bTransposed, scale, gradA, gradBTransposed, dx);

    public void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate) =>
        FactorOps.Narrow(x, m, scale, u, accumulate);

    public void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate) =>
        FactorOps.Widen(u, m, scale, y, accumulate);

    public void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient) =>
        FactorOps.AddOuter(u, x, scale, gradient);

    public void AddBias(TensorSlice y, DeviceTensor bias) => ColumnOps.AddBias(y, bias);

    public void AddColumnSums(TensorSlice dy, DeviceTensor gradient) => ColumnOps.AddColumnSums(dy, gradient);

    public void ScaleColumns(TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate) =>
        ColumnOps.Scale(_context, x, gain, y, accumulate);

    public void ScaleColumnsBackward(
        TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate) =>
        ColumnOps.ScaleBackward(_context, x, dy, gain, gradGain, dx, accumulate);

    public void CopyColumns(TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns) =>
        ColumnOps.Copy(source, sourceColumn, destination, destinationColumn, columns);

    public void Relu(TensorSlice x, TensorSlice y) => ElementwiseOps.Relu(_context, x, y);

    public void ReluBackward(TensorSlice y, TensorSlice dy, TensorSlice dx) => ElementwiseOps.ReluBackward(_context, y, dy, dx);

    public void Silu(TensorSlice x, TensorSlice y) => ElementwiseOps.Silu(x, y);

    public void SiluBackward(TensorSlice x, TensorSlice dy, TensorSlice dx) => ElementwiseOps.SiluBackward(_context, x, dy, dx);

    public void Pack(TensorSlice source, PackedFormat format, TensorSlice packed) =>
        PackOps.Pack(_context, source, format, packed);

    public void Unpack(TensorSlice packed, PackedFormat format, TensorSlice destination) =>
        PackOps.Unpack(_context, packed, format, destination);

    public void Rope(TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse) =>
        RowOps.Rope(_context, x, positions, table, inverse);

    public void AppendKv(TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments) =>
        AttentionOps.AppendKv(_context, k, v, layer, segments);

    public void Attention(TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments) =>
        AttentionOps.Run(_context, q, o, layer, segments);

    public void AttentionBackward(
        TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK, DeviceTensor dV) =>
        AttentionGradient.Run(_context, q, dO, layer, window, dQ, dK, dV);

    public void SiluGate(TensorSlice gate, TensorSlice up, TensorSlice y) => ElementwiseOps.SiluGate(gate, up, y);

    public void SiluGateBackward(TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp) =>
        ElementwiseOps.SiluGateBackward(_context, gate, up, dy, dGate, dUp);

    public void Add(TensorSlice a, TensorSlice b, TensorSlice y) => ElementwiseOps.Add(a, b, y);

    public void Logits(TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits) =>
        LossOps.Logits(_context, x, rows, head, logits);

    public void ArgMax(TensorSlice x, Span<int> columns) => LargestOps.ArgMax(_context, x, columns);

    public void Largest(TensorSlice x, int count, Span<float> values, Span<int> columns) =>
        LargestOps.Run(_context, x, count, values, columns);

    public void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx, TensorSlice losses) =>
        LossOps.CrossEntropy(_context, x, targets, head, gradientScale, dx, losses);

    public void SgdStep(DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options) =>
        OptimizerOps.Sgd(parameter, gradient, velocity, options);

    public void AdamWStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2, in AdamWStepOptions options) =>
        OptimizerOps.AdamW(parameter, gradient, moment1, moment2, options);

    public void Dispose()
    {
        _context.Memory.Add(-_scratchBytes);
        _scratchBytes = 0;
        _context.Dispose();
    }

    private DType TypeOf(TensorUse use) => use == TensorUse.Activation ? _context.ActivationType : DType.F32;
}
