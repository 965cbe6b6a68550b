using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Adapters;

/// <summary>Gradient accumulators of an adapter: a tensor of its shape for each of its tensors.</summary>
internal sealed class AdapterGradients : IDisposable
{
    private readonly ResourceSet _tensors = new();
    private readonly Dictionary<int, DeviceTensor[]> _sites = [];

    public AdapterGradients(IComputeBackend backend, PeftAdapter adapter)
    {
        try
        {
            foreach (int site in adapter.SiteIndices)
            {
                _sites.Add(site,
                    [.. adapter[site]!.Tensors.Select(t => _tensors.Add(backend.Allocate(t.Values.Rows, t.Values.Columns)))]);
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public long Bytes => _sites.Values.Sum(s => s.Sum(t => t.Bytes));

    /// <summary>Gradients of a site's tensors, in the network's order.</summary>
    public IReadOnlyList<DeviceTensor> this[int site]
    {
        get
        {
            Check.That(_sites.ContainsKey(site));
            return _sites[site];
        }
    }

    public void Zero(IComputeBackend backend)
    {
        foreach (DeviceTensor tensor in _sites.Values.SelectMany(s => s))
        {
            backend.Zero(tensor);
        }
    }

    public void Dispose() => _tensors.Dispose();
}
