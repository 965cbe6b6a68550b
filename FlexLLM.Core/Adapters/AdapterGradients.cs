using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Adapters;

/// <summary>Gradient accumulators of an adapter: dA [rank, in] and dB transposed [rank, out] for each site.</summary>
internal sealed class AdapterGradients : IDisposable
{
    private readonly Dictionary<int, (DeviceTensor A, DeviceTensor BTransposed)> _sites = [];

    public AdapterGradients(IComputeBackend backend, LoraAdapter adapter)
    {
        foreach (int site in adapter.SiteIndices)
        {
            DeviceLora pair = adapter[site]!;
            _sites.Add(site, (backend.Allocate(pair.Rank, pair.InFeatures), backend.Allocate(pair.Rank, pair.OutFeatures)));
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

    public void Dispose()
    {
        foreach ((DeviceTensor a, DeviceTensor b) in _sites.Values)
        {
            a.Dispose();
            b.Dispose();
        }
    }
}
