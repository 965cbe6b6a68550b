using FlexLLM.Adapters;
using FlexLLM.Backends;

namespace FlexLLM.Finetuning;

/// <summary>Optimizer state of an adapter (F32 master weights are the adapter's own) and its update.</summary>
internal sealed class AdapterOptimizer : IDisposable
{
    private readonly IComputeBackend _backend;
    private readonly OptimizerOptions _options;
    private readonly List<Parameter> _parameters = [];

    public AdapterOptimizer(IComputeBackend backend, OptimizerOptions options, LoraAdapter adapter, AdapterGradients gradients)
    {
        _backend = backend;
        _options = options;
        foreach (int site in adapter.SiteIndices)
        {
            DeviceLora pair = adapter[site]!;
            (DeviceTensor gradA, DeviceTensor gradB) = gradients[site];
            _parameters.Add(Create($"{site}.A", pair, pair.A, gradA));
            _parameters.Add(Create($"{site}.B", pair, pair.BTransposed, gradB));
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
                _backend.AdamWStep(p.Weight, p.Gradient, p.First!, p.Second!, step);
            }
            else
            {
                var sgd = (SgdOptions)_options;
                var step = new SgdStepOptions(sgd.LearningRate, sgd.Momentum, sgd.Nesterov, sgd.WeightDecay);
                _backend.SgdStep(p.Weight, p.Gradient, p.First, step);
            }
        }

        foreach (DeviceLora pair in _parameters.Select(p => p.Pair).Distinct())
        {
            _backend.RefreshLora(pair);
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

    public void Dispose()
    {
        foreach (Parameter p in _parameters)
        {
            p.First?.Dispose();
            p.Second?.Dispose();
        }
    }

    private Parameter Create(string name, DeviceLora pair, DeviceTensor weight, DeviceTensor gradient)
    {
        DeviceTensor? first = _options.Moments > 0 ? _backend.Allocate(weight.Rows, weight.Columns) : null;
        DeviceTensor? second = _options.Moments > 1 ? _backend.Allocate(weight.Rows, weight.Columns) : null;
        return new Parameter(name, pair, weight, gradient, first, second);
    }

    /// <summary>One weight with its gradient and the moments that its optimizer keeps.</summary>
    private sealed record Parameter(
        string Name, DeviceLora Pair, DeviceTensor Weight, DeviceTensor Gradient, DeviceTensor? First, DeviceTensor? Second);
}
