namespace FlexLLM.Primitives;

/// <summary>
/// Resources with one owner, freed together in reverse order. A constructor that allocates several on a device which may run
/// out of memory between two of them adds each as it comes, and disposes the set when it fails.
/// </summary>
internal sealed class ResourceSet : IDisposable
{
    private readonly Stack<IDisposable> _resources = [];

    /// <summary>Takes a resource over and returns it.</summary>
    public T Add<T>(T resource)
        where T : IDisposable
    {
        _resources.Push(resource);
        return resource;
    }

    public void Dispose()
    {
        while (_resources.TryPop(out IDisposable? resource))
        {
            resource.Dispose();
        }
    }
}
