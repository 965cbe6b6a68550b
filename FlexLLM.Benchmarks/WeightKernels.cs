using BenchmarkDotNet.Attributes;
using FlexLLM.Backends;

namespace FlexLLM.Benchmarks;

/// <summary>Operations that stream a frozen weight.</summary>
public class WeightKernels : KernelOperands
{
    private DeviceWeight _up = null!;
    private DeviceWeight _head = null!;
    private DeviceTensor _narrow = null!;
    private DeviceTensor _narrowResult = null!;
    private DeviceTensor _wide = null!;
    private DeviceTensor _wideResult = null!;
    private DeviceTensor _losses = null!;
    private int[] _targets = [];

    /// <summary>Storage of the weights.</summary>
    [Params(DType.F32, DType.BF16)]
    public DType Weights { get; set; }

    /// <summary>Up projection.</summary>
    [Benchmark]
    public void Linear() => Backend.Linear(_narrow, _up, null, _wideResult, accumulate: false);

    /// <summary>Its input gradient.</summary>
    [Benchmark]
    public void LinearBackwardInput() => Backend.LinearBackwardInput(_wide, _up, _narrowResult, accumulate: false);

    /// <summary>Loss and its gradient over a vocabulary of 32,768.</summary>
    [Benchmark]
    public void FusedLinearCrossEntropy() =>
        Backend.FusedLinearCrossEntropy(_narrow, _targets, _head, 1f, _narrowResult, _losses);

    private protected override void MakeOperands()
    {
        _up = Weight(Intermediate, Hidden, Weights);
        _head = Weight(Vocabulary, Hidden, Weights);
        _narrow = Tensor(Rows, Hidden);
        _narrowResult = Tensor(Rows, Hidden);
        _wide = Tensor(Rows, Intermediate);
        _wideResult = Tensor(Rows, Intermediate);
        _targets = [.. Enumerable.Range(0, Rows)];
        _losses = Tensor(Rows, 1);
    }
}
