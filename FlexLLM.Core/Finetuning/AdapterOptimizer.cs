using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Finetuning;

/// <summary>Optimizer state of an adapter (F32 master weights are the adapter's own) and its update.</summary>
internal sealed class AdapterOptimizer : IDisposable
{
    private readonly IComputeBackend _backend;
    private readonly OptimizerOptions _options;
    private readonly List<Parameter> _parameters = [];
    private readonly ResourceSet _state = new();

    public AdapterOptimizer(IComputeBackend backend, OptimizerOptions options, LoraAdapter adapter, AdapterGradients gradients)
    {
        _backend = backend;
        _options = options;
        try
        {
            foreach (int site in adapter.SiteIndices)
            {
                LoraPair pair = adapter[site]!;
                (DeviceTensor gradA, DeviceTensor gradB) = gradients[site];
                _parameters.Add(Create($"{site}.A", pair.A, gradA));
                _parameters.Add(Create($"{site}.B", pair.BTransposed, gradB));
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <summary>Updates done so far.</summary>
    public int Steps { get; set; }

    public long Bytes => State().Sum(s => s.Tensor.Bytes);

    /// <summary>Applies the accumulated gradients to the adapter.</summary>
    public void Step()
    {
        Steps++;
        foreach (Parameter p in _parameters)
        {
            if (_options is AdamWOptions adam)
            {
                var step = new AdamWStepOptions(adam.LearningRate, adam.Beta1, adam.Beta2, adam.Epsilon, adam.WeightDecay, Steps);
                _backend.AdamWStep(p.Weight.Values, p.Gradient, p.First!, p.Second!, step);
            }
            else
            {
                var sgd = (SgdOptions)_options;
                var step = new SgdStepOptions(sgd.LearningRate, sgd.Momentum, sgd.Nesterov, sgd.WeightDecay);
                _backend.SgdStep(p.Weight.Values, p.Gradient, p.First, step);
            }
        }

        foreach (Parameter p in _parameters)
        {
            _backend.RefreshFactor(p.Weight);
        }
    }

    /// <summary>State tensors by a name that is stable for the adapter's config: what a checkpoint stores.</summary>
    public IEnumerable<(string Name, DeviceTensor Tensor)> State()
    {
        foreach (Parameter p in _parameters)
        {
            if (p.First is not null)
            {
                yield return ($"{p.Name}.first", p.First);
            }

            if (p.Second is not null)
            {
                yield return ($"{p.Name}.second", p.Second);
            }
        }
    }

    public void Dispose() => _state.Dispose();

    private Parameter Create(string name, DeviceFactor weight, DeviceTensor gradient)
    {
        DeviceTensor? first = _options.Moments > 0 ? _state.Add(_backend.Allocate(weight.Inner, weight.Wide)) : null;
        DeviceTensor? second = _options.Moments > 1 ? _state.Add(_backend.Allocate(weight.Inner, weight.Wide)) : null;
        return new Parameter(name, weight, gradient, first, second);
    }

    /// <summary>One weight with its gradient and the moments that its optimizer keeps.</summary>
    private sealed record Parameter(
        string Name, DeviceFactor Weight, DeviceTensor Gradient, DeviceTensor? First, DeviceTensor? Second);
}
