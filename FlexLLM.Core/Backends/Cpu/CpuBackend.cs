using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>
/// The waist on managed SIMD, bitwise deterministic: see the remarks of <see cref="IComputeBackend"/>. Threads split outputs,
/// never a sum, and every sum has an order of its own that nothing about the call changes.
/// </summary>
/// <param name="threads">Threads that compute, the caller's included; at least 1.</param>
internal sealed unsafe class CpuBackend(int threads) : IComputeBackend
{
    private readonly CpuContext _cpu = new(threads);

    public string Name { get; } = threads == 1 ? "cpu (1 thread)" : $"cpu ({threads} threads)";

    public long AllocatedBytes => _cpu.Memory.Bytes;

    public string? PeerKind => "cpu";

    public void Synchronize()
    {
    }

    public long TensorBytes(int rows, int columns, TensorUse use = TensorUse.Exact) => CpuTensor.BytesOf(rows, columns);

    public long WeightBytes(int outFeatures, int inFeatures, DType type) => CpuWeight.BytesOf(outFeatures, inFeatures, type);

    public long FactorBytes(int inner, int wide) => CpuTensor.BytesOf(inner, wide) + CpuWeight.BytesOf(inner, wide, DType.F32);

    public long KvCacheBytes(int layers, int blocks, int kvHeads, int headDim) =>
        CpuKvCache.BytesOf(layers, blocks, kvHeads, headDim);

    public long ScratchBytes(in ScratchLimits limits) => Workspace.BytesFor(CpuScratch.BytesOf(limits, _cpu.Team.Threads));

    public void ReserveScratch(in ScratchLimits limits) =>
        _cpu.Workspace.Reserve(CpuScratch.BytesOf(limits, _cpu.Team.Threads));

    public DeviceTensor Allocate(int rows, int columns, TensorUse use = TensorUse.Exact) => new CpuTensor(_cpu.Memory, rows, columns);

    public DeviceTensor View(DeviceTensor owner, long offset, int rows, int columns) =>
        new CpuTensor((CpuTensor)owner, offset, rows, columns);

    public DeviceWeight CreateWeight(in HostMatrix source, DType type)
    {
        CpuWeight weight = new(_cpu.Memory, source.Rows, source.Columns, type);
        weight.Pack(_cpu.Team, source);
        return weight;
    }

    public DeviceKvCache CreateKvCache(int layers, int blocks, int kvHeads, int headDim) =>
        new CpuKvCache(_cpu.Memory, layers, blocks, kvHeads, headDim);

    public void ResizeKvCache(DeviceKvCache cache, int blocks) => ((CpuKvCache)cache).Resize(blocks);

    public DeviceFactor CreateFactor(int inner, int wide)
    {
        CpuFactor factor = new(_cpu.Memory, inner, wide);
        factor.Refresh(_cpu.Team);
        return factor;
    }

    public void RefreshFactor(DeviceFactor factor) => ((CpuFactor)factor).Refresh(_cpu.Team);

    public void Upload(ReadOnlySpan<float> source, TensorSlice destination)
    {
        Check.That(source.Length == (long)destination.Rows * destination.Columns);
        source.CopyTo(new Span<float>(CpuTensor.Of(destination), source.Length));
    }

    public void Download(TensorSlice source, Span<float> destination)
    {
        Check.That(destination.Length == (long)source.Rows * source.Columns);
        new ReadOnlySpan<float>(CpuTensor.Of(source), destination.Length).CopyTo(destination);
    }

    public void Copy(TensorSlice source, TensorSlice destination)
    {
        Check.That(source.Rows == destination.Rows && source.Columns == destination.Columns);
        long bytes = (long)source.Rows * source.Columns * sizeof(float);
        Buffer.MemoryCopy(CpuTensor.Of(source), CpuTensor.Of(destination), bytes, bytes);
    }

    public void ReadPeer(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate) =>
        Rectangle.Move(CpuTensor.SpanOf(source), from, CpuTensor.SpanOf(destination), to, accumulate);

    public void Zero(TensorSlice destination)
    {
        nuint bytes = (nuint)((long)destination.Rows * destination.Columns * sizeof(float));
        System.Runtime.InteropServices.NativeMemory.Clear(CpuTensor.Of(destination), bytes);
    }

    public void Gather(DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y) => LinearOps.Gather(_cpu, table, ids, y);

    public void RmsNorm(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y) =>
        NormOps.Forward(_cpu, x, gain, epsilon, y);

    public void RmsNormBackward(
        TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate) =>
        NormOps.Backward(_cpu, x, gain, epsilon, dy, dx, accumulate);

    public void Linear(TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate) =>
        LinearOps.Forward(_cpu, x, weight, bias, y, accumulate);

    public void LinearBackwardInput(TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate) =>
        LinearOps.BackwardInput(_cpu, dy, weight, dx, accumulate);

    public void LoraBypass(TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y) =>
        LoraOps.Forward(_cpu, x, segments, y);

    public void LoraBypassBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx) =>
        LoraOps.Backward(_cpu, x, dy, a, bTransposed, scale, gradA, gradBTransposed, dx);

    public void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate) =>
        FactorOps.Narrow(_cpu, x, m, scale, u, accumulate);

    public void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate) =>
        FactorOps.Widen(_cpu, u, m, scale, y, accumulate);

    public void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient) =>
        FactorOps.AddOuter(_cpu, u, x, scale, gradient);

    public void AddBias(TensorSlice y, DeviceTensor bias) => ColumnOps.AddBias(_cpu, y, bias);

    public void AddColumnSums(TensorSlice dy, DeviceTensor gradient) => ColumnOps.AddColumnSums(_cpu, dy, gradient);

    public void ScaleColumns(TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate) =>
        ColumnOps.Scale(_cpu, x, gain, y, accumulate);

    public void ScaleColumnsBackward(
        TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate) =>
        ColumnOps.ScaleBackward(_cpu, x, dy, gain, gradGain, dx, accumulate);

    public void CopyColumns(TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns) =>
        ColumnOps.Copy(_cpu, source, sourceColumn, destination, destinationColumn, columns);

    public void Relu(TensorSlice x, TensorSlice y) => ElementwiseOps.Relu(_cpu, x, y);

    public void ReluBackward(TensorSlice y, TensorSlice dy, TensorSlice dx) => ElementwiseOps.ReluBackward(_cpu, y, dy, dx);

    public void Silu(TensorSlice x, TensorSlice y) => ElementwiseOps.Silu(_cpu, x, y);

    public void SiluBackward(TensorSlice x, TensorSlice dy, TensorSlice dx) => ElementwiseOps.SiluBackward(_cpu, x, dy, dx);

    public void Pack(TensorSlice source, PackedFormat format, TensorSlice packed) => PackOps.Pack(_cpu, source, format, packed);

    public void Unpack(TensorSlice packed, PackedFormat format, TensorSlice destination) =>
        PackOps.Unpack(_cpu, packed, format, destination);

    public void Rope(TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse) =>
        ElementwiseOps.Rope(_cpu, x, positions, table, inverse);

    public void AppendKv(TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments) =>
        AttentionForward.AppendKv(_cpu, k, v, layer, segments);

    public void Attention(TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments) =>
        AttentionForward.Run(_cpu, q, o, layer, segments);

    public void AttentionBackward(
        TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK, DeviceTensor dV) =>
        Cpu.AttentionBackward.Run(_cpu, q, dO, layer, window, dQ, dK, dV);

    public void SiluGate(TensorSlice gate, TensorSlice up, TensorSlice y) => ElementwiseOps.SiluGate(_cpu, gate, up, y);

    public void SiluGateBackward(TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp) =>
        ElementwiseOps.SiluGateBackward(_cpu, gate, up, dy, dGate, dUp);

    public void Add(TensorSlice a, TensorSlice b, TensorSlice y) => ElementwiseOps.Add(_cpu, a, b, y);

    public void Logits(TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits) =>
        CrossEntropyOp.Logits(_cpu, x, rows, head, logits);

    public void ArgMax(TensorSlice x, Span<int> columns) => LargestOp.ArgMax(x, columns);

    public void Largest(TensorSlice x, int count, Span<float> values, Span<int> columns) => LargestOp.Run(x, count, values, columns);

    public void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx, TensorSlice losses) =>
        CrossEntropyOp.Run(_cpu, x, targets, head, gradientScale, dx, losses);

    public void SgdStep(DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options) =>
        ElementwiseOps.SgdStep(_cpu, parameter, gradient, velocity, options);

    public void AdamWStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2, in AdamWStepOptions options) =>
        ElementwiseOps.AdamWStep(_cpu, parameter, gradient, moment1, moment2, options);

    public void Dispose() => _cpu.Dispose();
}
