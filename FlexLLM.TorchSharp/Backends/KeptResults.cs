using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// What was made of index tensors: angles of the positions. Whoever has the same index tensor again, as every layer of a step does
/// (<see cref="KeptIndices"/>), finds it here.
/// </summary>
internal sealed class KeptResults : IDisposable
{
    /// <summary>A step has angles, and so has a backward item, in both directions.</summary>
    public const int Count = 4;

    // The latest first. Compared by identity: an index tensor that is gone is never equal to a new one.
    private readonly List<(Tensor Indices, object Kind, bool Variant, Tensor[] Results)> _entries = new(Count);

    /// <summary>Tensors that stay this object's; null where there are none.</summary>
    public Tensor[]? Find(Tensor indices, object kind, bool variant)
    {
        for (int i = 0; i < _entries.Count; i++)
        {
            (Tensor known, object knownKind, bool knownVariant, Tensor[] results) = _entries[i];
            if (ReferenceEquals(known, indices) && ReferenceEquals(knownKind, kind) && knownVariant == variant)
            {
                _entries.RemoveAt(i);
                _entries.Insert(0, (known, kind, variant, results));
                return results;
            }
        }

        return null;
    }

    /// <summary>Keeps tensors of the open scope in place of those that were not asked for longest.</summary>
    public Tensor[] Keep(Tensor indices, object kind, bool variant, Tensor[] results)
    {
        if (_entries.Count == Count)
        {
            Dispose(_entries[^1].Results);
            _entries.RemoveAt(Count - 1);
        }

        foreach (Tensor result in results)
        {
            result.DetachFromDisposeScope();
        }

        _entries.Insert(0, (indices, kind, variant, results));
        return results;
    }

    public void Dispose()
    {
        foreach ((_, _, _, Tensor[] results) in _entries)
        {
            Dispose(results);
        }

        _entries.Clear();
    }

    private static void Dispose(Tensor[] results)
    {
        foreach (Tensor result in results)
        {
            result.Dispose();
        }
    }
}
