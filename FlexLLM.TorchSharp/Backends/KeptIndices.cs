using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// The index tensors that were asked for last. Every layer of a step gathers by the same block tables, rotates by the same positions
/// and writes to the same slots: whoever asks for numbers that are still here gets the tensor that was made for them. What counts
/// is the numbers, or fewer that they follow from (<see cref="SequenceIndices"/>), so nobody has to say when a step begins.
/// </summary>
/// <param name="count">Most tensors kept, until limits of calls are known; 0 keeps none, whatever those are.</param>
internal sealed class KeptIndices(int count) : IDisposable
{
    /// <summary>
    /// A step has about four kinds of indices, a job's window as many, and each further prompt or run of decode rows one
    /// or two.
    /// </summary>
    public const int CountDefault = 24;

    /// <summary>Longer ones are not kept, until limits of calls are known.</summary>
    public const int LengthDefault = 1 << 16;

    // The latest first.
    private readonly List<(long[] Key, int Length, Tensor Tensor)> _entries = new(count);
    private int _count = count;
    private long _lengthMax = LengthDefault;

    /// <summary>Bytes that kept tensors hold on the device at most.</summary>
    public static long BytesMax(in ScratchLimits limits)
    {
        long longest = Math.Max(limits.Rows, (long)limits.Segments * limits.Positions);
        return CountFor(limits) * sizeof(long) * Math.Min(longest, LengthFor(limits));
    }

    /// <summary>Keeps as many, and as long ones, as a step within these limits asks for: the next layer finds them all.</summary>
    public void Fit(in ScratchLimits limits)
    {
        (_count, _lengthMax) = (_count == 0 ? 0 : (int)CountFor(limits), LengthFor(limits));
        while (_entries.Count > _count)
        {
            DropLast();
        }
    }

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
        if (_count == 0 || length > _lengthMax)
        {
            return tensor;
        }

        long[] known = [];
        if (_entries.Count == _count)
        {
            known = _entries[^1].Key;
            DropLast();
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

    // Runs of decode rows are cut at about so many positions, and ask for two each.
    private static long CountFor(in ScratchLimits limits)
    {
        long runs = ((long)limits.Segments * limits.Positions) / LengthDefault;
        return Math.Max(CountDefault, (CountDefault / 2) + (2 * (runs + 1)));
    }

    private static long LengthFor(in ScratchLimits limits) => Math.Max(LengthDefault, limits.Positions);

    private void DropLast()
    {
        _entries[^1].Tensor.Dispose();
        _entries.RemoveAt(_entries.Count - 1);
    }
}
