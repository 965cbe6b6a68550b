using System.Runtime.InteropServices;
using TorchSharp;

namespace FlexLLM.Benchmarks;

/// <summary>
/// Copies and products of libtorch itself, without the engine's waist: what the device does at best for operands that have the type
/// of the weights, with nothing to convert.
/// </summary>
internal sealed class TorchProbe : DeviceProbe
{
    private readonly torch.Tensor _from;
    private readonly torch.Tensor _to;
    private readonly torch.Tensor _end;
    private readonly Dictionary<DType, (torch.Tensor X, torch.Tensor W)> _operands = [];

    /// <param name="choice">A device of libtorch.</param>
    /// <param name="size">How much.</param>
    public TorchProbe(DeviceChoice choice, ProbeSize size)
    {
        var device = choice.IsCuda ? new torch.Device(DeviceType.CUDA, choice.CudaIndex) : new torch.Device(DeviceType.CPU);
        long rows = size.CopyBytes / sizeof(float) / size.Side;
        _from = torch.ones(rows, size.Side, torch.ScalarType.Float32, device);
        _to = torch.ones(rows, size.Side, torch.ScalarType.Float32, device);
        _end = torch.ones(1, 1, torch.ScalarType.Float32, device);
        (torch.Tensor x, torch.Tensor w) = (Filled(size.Rows, size.Side, device), Filled(size.Side, size.Side, device));
        _operands[DType.F32] = (x, w);
        _operands[DType.BF16] = (x.to_type(torch.ScalarType.BFloat16), w.to_type(torch.ScalarType.BFloat16));
    }

    /// <summary>Native tensors that this thread has made so far.</summary>
    public static long TensorsMade =>
        DisposeScopeManager.Statistics.CreatedInScopeCount + DisposeScopeManager.Statistics.CreatedOutsideScopeCount;

    public override void Copy()
    {
        using DisposeScope scope = torch.NewDisposeScope();
        _to.copy_(_from);
    }

    // As the engine holds weights, [out, in].
    public override void Multiply(DType weights)
    {
        using DisposeScope scope = torch.NewDisposeScope();
        (torch.Tensor x, torch.Tensor w) = _operands[weights];
        x.mm(w.t());
    }

    public override void Wait()
    {
        using DisposeScope scope = torch.NewDisposeScope();
        _end.cpu();
    }

    public override void Dispose()
    {
        foreach (torch.Tensor tensor in _operands.Values.SelectMany(pair => new[] { pair.X, pair.W }).Concat([_from, _to, _end]))
        {
            tensor.Dispose();
        }
    }

    private static torch.Tensor Filled(long rows, long columns, torch.Device device)
    {
        using torch.Tensor host = torch.empty(rows, columns, torch.ScalarType.Float32, new torch.Device(DeviceType.CPU));
        MemoryMarshal.AsBytes<float>(BackendProbe.Values(rows * columns)).CopyTo(host.bytes);
        return host.to(device, copy: true);
    }
}
