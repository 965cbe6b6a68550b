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

    /// <summary>Most bytes on the device, beside lists as long as a batch.</summary>
    public const long BytesDefault = 32L << 20;

    private const int ListsOfRows = 16;

    // The latest first.
    private readonly List<(long[] Key, int Length, Tensor Tensor, long Bytes)> _entries = new(count);
    private int _count = count;
    private long _bytesMax = BytesDefault;
    private long _bytes;

    /// <summary>Bytes that kept tensors hold on the device at most: an index and a mask for each position, and lists of rows.</summary>
    public static long BytesMax(in ScratchLimits limits)
    {
        long positions = limits.Segments * (long)limits.Positions * (sizeof(long) + 1);
        return Math.Min(BytesDefault, positions) + (ListsOfRows * sizeof(long) * (long)limits.Rows);
    }

    /// <summary>
    /// Keeps as many as a step within these limits asks for, two for each sequence at worst, so that the next layer finds them all, unless
    /// they are more than <see cref="BytesDefault"/>.
    /// </summary>
    public void Fit(in ScratchLimits limits)
    {
        _count = _count == 0 ? 0 : (CountDefault / 2) + Math.Max(CountDefault / 2, 2 * limits.Segments);
        _bytesMax = BytesMax(limits);
        MakeRoom(0);
    }

    /// <summary>The tensor that is kept under these numbers, which stays this object's; null where there is none.</summary>
    public Tensor? Find(ReadOnlySpan<long> key)
    {
        for (int i = 0; i < _entries.Count; i++)
        {
            (long[] known, int length, Tensor tensor, long bytes) = _entries[i];
            if (length == key.Length && key.SequenceEqual(known.AsSpan(0, length)))
            {
                _entries.RemoveAt(i);
                _entries.Insert(0, (known, length, tensor, bytes));
                return tensor;
            }
        }

        return null;
    }

    /// <summary>Whether that tensor is one of the kept ones.</summary>
    public bool Has(Tensor tensor)
    {
        foreach ((_, _, Tensor kept, _) in _entries)
        {
            if (ReferenceEquals(kept, tensor))
            {
                return true;
            }
        }

        return false;
    }

    /// <summary>
    /// Keeps a tensor of the open scope, of so many bytes, in place of those that were not asked for longest, if it is not too large.
    /// </summary>
    public Tensor Keep(ReadOnlySpan<long> key, long bytes, Tensor tensor)
    {
        if (_count == 0 || bytes > _bytesMax)
        {
            return tensor;
        }

        long[] known = MakeRoom(bytes, 1);
        known = known.Length < key.Length ? new long[key.Length] : known;
        key.CopyTo(known);
        _entries.Insert(0, (known, key.Length, tensor.DetachFromDisposeScope(), bytes));
        _bytes += bytes;
        return tensor;
    }

    public void Dispose()
    {
        foreach ((_, _, Tensor tensor, _) in _entries)
        {
            tensor.Dispose();
        }

        _entries.Clear();
        _bytes = 0;
    }

    // Drops the last ones until there is room for so many more. The key of one of them, for the next.
    private long[] MakeRoom(long bytes, int entries = 0)
    {
        long[] key = [];
        while (_entries.Count > 0 && (_entries.Count + entries > _count || _bytes + bytes > _bytesMax))
        {
            (key, _, Tensor tensor, long held) = _entries[^1];
            tensor.Dispose();
            _bytes -= held;
            _entries.RemoveAt(_entries.Count - 1);
        }

        return key;
    }
}
