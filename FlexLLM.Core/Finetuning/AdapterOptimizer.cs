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

    public AdapterOptimizer(IComputeBackend backend, OptimizerOptions options, PeftAdapter adapter, AdapterGradients gradients)
    {
        _backend = backend;
        _options = options;
        try
        {
            foreach (int site in adapter.SiteIndices)
            {
                foreach ((AdapterTensor tensor, DeviceTensor gradient) in adapter[site]!.Tensors.Zip(gradients[site]))
                {
                    _parameters.Add(Create($"{site}.{tensor.Spec.Name}", tensor, gradient));
                }
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

    public long Bytes => State().Sum(s => s.Moment.Bytes);

    /// <summary>Applies the accumulated gradients to the adapter.</summary>
    public void Step()
    {
        Steps++;
        foreach (Parameter p in _parameters)
        {
            if (_options is AdamWOptions adam)
            {
                var step = new AdamWStepOptions(adam.LearningRate, adam.Beta1, adam.Beta2, adam.Epsilon, adam.WeightDecay, Steps);
                _backend.AdamWStep(p.Tensor.Values, p.Gradient, p.First!, p.Second!, step);
            }
            else
            {
                var sgd = (SgdOptions)_options;
                var step = new SgdStepOptions(sgd.LearningRate, sgd.Momentum, sgd.Nesterov, sgd.WeightDecay);
                _backend.SgdStep(p.Tensor.Values, p.Gradient, p.First, step);
            }

            p.Tensor.Refresh(_backend);
        }
    }

    /// <summary>
    /// Moments, divided as their tensor is, by a name that is stable for the adapter's config: what a checkpoint stores.
    /// </summary>
    public IEnumerable<(string Name, AdapterTensor Tensor, DeviceTensor Moment)> State()
    {
        foreach (Parameter p in _parameters)
        {
            if (p.First is not null)
            {
                yield return ($"{p.Name}.first", p.Tensor, p.First);
            }

            if (p.Second is not null)
            {
                yield return ($"{p.Name}.second", p.Tensor, p.Second);
            }
        }
    }

    public void Dispose() => _state.Dispose();

    private Parameter Create(string name, AdapterTensor tensor, DeviceTensor gradient)
    {
        (int rows, int columns) = (tensor.Values.Rows, tensor.Values.Columns);
        DeviceTensor? first = _options.Moments > 0 ? _state.Add(_backend.Allocate(rows, columns)) : null;
        DeviceTensor? second = _options.Moments > 1 ? _state.Add(_backend.Allocate(rows, columns)) : null;
        return new Parameter(name, tensor, gradient, first, second);
    }

    /// <summary>One tensor with its gradient and the moments that its optimizer keeps.</summary>
    private sealed record Parameter(
        string Name, AdapterTensor Tensor, DeviceTensor Gradient, DeviceTensor? First, DeviceTensor? Second);
}
