using FlexLLM.Primitives;

namespace FlexLLM.Adapters;

/// <summary>
/// One published state of an adapter. It never changes; it is freed when the store has moved on and the last request that
/// started with it has ended.
/// </summary>
internal sealed class AdapterVersion(int number, PeftAdapter weights)
{
    private int _references = 1;

    /// <summary>Counts publications of the adapter, from 1.</summary>
    public int Number { get; } = number;

    public PeftAdapter Weights { get; } = weights;

    public AdapterVersion Acquire()
    {
        Check.That(_references > 0);
        _references++;
        return this;
    }

    public void Release()
    {
        Check.That(_references > 0);
        if (--_references == 0)
        {
            Weights.Dispose();
        }
    }
}

/// <summary>The adapters that requests can name, each at its newest version. Owned by the loop thread.</summary>
internal sealed class AdapterStore(int adaptersMax) : IDisposable
{
    private readonly SortedDictionary<string, AdapterVersion> _versions = new(StringComparer.Ordinal);

    public IReadOnlyCollection<string> Names => _versions.Keys;

    public IReadOnlyCollection<AdapterVersion> Versions => _versions.Values;

    public bool Contains(string name) => _versions.ContainsKey(name);

    /// <summary>The newest version. Throws <see cref="RequestRejectedException"/> for an unknown name.</summary>
    public AdapterVersion Get(string name) => _versions.TryGetValue(name, out AdapterVersion? version)
        ? version
        : throw new RequestRejectedException(
            $"No adapter '{name}' is loaded; loaded are: {(Names.Count == 0 ? "none" : string.Join(", ", Names))}.");

    /// <summary>Makes weights the newest version of a name. The store owns them from here on, also when it refuses.</summary>
    public AdapterVersion Publish(string name, PeftAdapter weights)
    {
        AdapterVersion? old = _versions.GetValueOrDefault(name);
        if (old is null && _versions.Count >= adaptersMax)
        {
            weights.Dispose();
            throw new RequestRejectedException(
                $"Adapter '{name}' does not fit: {adaptersMax} adapters are loaded (AdaptersMax). Unload one.");
        }

        var version = new AdapterVersion((old?.Number ?? 0) + 1, weights);
        _versions[name] = version;
        old?.Release();
        return version;
    }

    /// <summary>Requests in flight keep their version; new ones no longer find the name.</summary>
    public void Remove(string name)
    {
        AdapterVersion version = Get(name);
        _versions.Remove(name);
        version.Release();
    }

    public void Rename(string name, string newName)
    {
        AdapterVersion version = Get(name);
        if (_versions.ContainsKey(newName))
        {
            throw new RequestRejectedException($"Adapter '{newName}' exists already; unload it first.");
        }

        _versions.Remove(name);
        _versions.Add(newName, version);
    }

    public void Dispose()
    {
        foreach (AdapterVersion version in _versions.Values)
        {
            version.Release();
        }

        _versions.Clear();
    }
}
