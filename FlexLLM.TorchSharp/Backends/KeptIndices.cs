using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// The index tensors that were asked for last. Every layer of a step gathers by the same block tables, rotates by the same positions
/// and writes to the same slots: whoever asks for numbers that are still here gets the tensor that was made for them. What counts
/// is the numbers, or fewer that they follow from (<see cref="SequenceIndices"/>), so nobody has to say when a step begins.
/// </summary>
/// <param name="count">Most tensors kept; 0 keeps none.</param>
internal sealed class KeptIndices(int count) : IDisposable
{
    /// <summary>
    /// A step has about four kinds of indices, a job's window as many, and each further prompt or run of decode rows one
    /// or two.
    /// </summary>
    public const int CountDefault = 24;

    /// <summary>Longer ones are not kept.</summary>
    public const int LengthMax = 1 << 16;

    // The latest first.
    private readonly List<(long[] Key, int Length, Tensor Tensor)> _entries = new(count);

    /// <summary>Bytes that kept tensors hold on the device at most, where none is longer.</summary>
    public static long BytesMax(long length) => CountDefault * sizeof(long) * Math.Min(length, LengthMax);

    /// <summary>The tensor that is kept under these numbers, which stays this object's; null where there is none.</summary>
    public Tensor? Find(ReadOnlySpan<long> key)
    {
        for (int i = 0; i < _entries.Count; i++)
        {
            (long[] known, int length, Tensor tensor) = _entries[i];
            if (length == key.Length && key.SequenceEqual(known.AsSpan(0, length)))
            {
                _entries.RemoveAt(i);
                _entries.Insert(0, (known, length, tensor));
                return tensor;
            }
        }

        return null;
    }

    /// <summary>Whether that tensor is one of the kept ones.</summary>
    public bool Has(Tensor tensor)
    {
        foreach ((_, _, Tensor kept) in _entries)
        {
            if (ReferenceEquals(kept, tensor))
            {
                return true;
            }
        }

        return false;
    }

    /// <summary>
    /// Keeps a tensor of the open scope, of so many numbers, in place of the one that was not asked for longest, if it is short enough.
    /// </summary>
    public Tensor Keep(ReadOnlySpan<long> key, int length, Tensor tensor)
    {
        if (count == 0 || length > LengthMax)
        {
            return tensor;
        }

        long[] known = [];
        if (_entries.Count == count)
        {
            known = _entries[^1].Key;
            _entries[^1].Tensor.Dispose();
            _entries.RemoveAt(count - 1);
        }

        known = known.Length < key.Length ? new long[key.Length] : known;
        key.CopyTo(known);
        _entries.Insert(0, (known, key.Length, tensor.DetachFromDisposeScope()));
        return tensor;
    }

    public void Dispose()
    {
        foreach ((_, _, Tensor tensor) in _entries)
        {
            tensor.Dispose();
        }

        _entries.Clear();
    }
}
