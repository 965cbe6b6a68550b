using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Adapters;

/// <summary>Gradient accumulators of an adapter: dA [rank, in] and dB transposed [rank, out] for each site.</summary>
internal sealed class AdapterGradients : IDisposable
{
    private readonly ResourceSet _tensors = new();
    private readonly Dictionary<int, (DeviceTensor A, DeviceTensor BTransposed)> _sites = [];

    public AdapterGradients(IComputeBackend backend, LoraAdapter adapter)
    {
        try
        {
            foreach (int site in adapter.SiteIndices)
            {
                LoraPair pair = adapter[site]!;
                DeviceTensor a = _tensors.Add(backend.Allocate(pair.Rank, pair.InFeatures));
                _sites.Add(site, (a, _tensors.Add(backend.Allocate(pair.Rank, pair.OutFeatures))));
            }
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    public long Bytes => _sites.Values.Sum(s => s.A.Bytes + s.BTransposed.Bytes);

    public (DeviceTensor A, DeviceTensor BTransposed) this[int site]
    {
        get
        {
            Check.That(_sites.ContainsKey(site));
            return _sites[site];
        }
    }

    public void Zero(IComputeBackend backend)
    {
        foreach ((DeviceTensor a, DeviceTensor b) in _sites.Values)
        {
            backend.Zero(a);
            backend.Zero(b);
        }
    }

    public void Dispose() => _tensors.Dispose();
}
