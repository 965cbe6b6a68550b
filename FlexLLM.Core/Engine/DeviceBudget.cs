using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.KvCache;

namespace FlexLLM.Engine;

/// <summary>
/// The bytes of the device that an engine shares out: weights and workspace have theirs for good, adapters and jobs take what they
/// need, the KV cache has the rest up to its size. Who needs more than is free takes it from the end of the KV cache, down to
/// a floor; the cache takes it back as soon as it is free. What is held is what the backend counts: there is no second ledger.
/// </summary>
internal sealed class DeviceBudget
{
    private readonly IComputeBackend _backend;
    private readonly KvPool _pool;
    private readonly Func<int> _blocksPromised;
    private readonly Action<int> _vacate;
    private readonly Func<bool> _relinquish;
    private readonly int _blocksMin;
    private long _bytesAtFailure = -1;

    /// <param name="backend">The device.</param>
    /// <param name="pool">The KV cache that lends.</param>
    /// <param name="bytesMax">Most bytes on the device.</param>
    /// <param name="blocksMin">Blocks that the KV cache keeps in any case.</param>
    /// <param name="blocksPromised">Blocks that the longest request in the engine may come to need.</param>
    /// <param name="vacate">Makes requests give up all blocks from this one on.</param>
    /// <param name="relinquish">Frees what is held only because nobody else needed it; false where there is no such thing.</param>
    public DeviceBudget(
        IComputeBackend backend, KvPool pool, long bytesMax, int blocksMin, Func<int> blocksPromised, Action<int> vacate,
        Func<bool> relinquish)
    {
        _backend = backend;
        _pool = pool;
        _blocksMin = blocksMin;
        _blocksPromised = blocksPromised;
        _vacate = vacate;
        _relinquish = relinquish;
        BytesMax = bytesMax;
    }

    public long BytesMax { get; }

    /// <summary>Bytes that nobody holds.</summary>
    public long BytesFree => BytesMax - _backend.AllocatedBytes;

    /// <summary>Whether so many bytes are free while the KV cache has its full size: for what is good to have, no more.</summary>
    public bool HasSpare(long bytes) => _pool.Blocks.BlocksTotal == _pool.BlocksMax && bytes <= BytesFree;

    /// <summary>Bytes that the KV cache would give besides.</summary>
    public long BytesLendable => (_pool.Blocks.BlocksTotal - Floor) * _pool.BlockBytes;

    private int Floor => _pool.SizeFor(Math.Max(_blocksMin, _blocksPromised()));

    /// <summary>
    /// Makes so many bytes free, if need be by shrinking the KV cache. False, with nothing changed, where that is not enough.
    /// </summary>
    public bool TryFree(long bytes)
    {
        if (bytes <= BytesFree || (_relinquish() && bytes <= BytesFree))
        {
            return true;
        }

        int blocks = _pool.SizeWithout(bytes - BytesFree);
        if (blocks < Floor)
        {
            return false;
        }

        _vacate(blocks);
        _pool.Resize(blocks);
        return true;
    }

    /// <summary>Makes so many bytes free, or refuses what needs them.</summary>
    /// <param name="bytes">Bytes that are about to be allocated.</param>
    /// <param name="what">Who needs them, as the start of a sentence: "The job on 'a'".</param>
    /// <param name="needs">What for.</param>
    /// <param name="advice">What would need less; asked for when it is refused.</param>
    /// <exception cref="RequestRejectedException">They cannot be had.</exception>
    public void Require(long bytes, string what, MemoryTable needs, Func<long, string> advice)
    {
        if (TryFree(bytes))
        {
            return;
        }

        long attainable = Math.Max(0, BytesFree) + BytesLendable;
        throw new RequestRejectedException(
            $"{what} does not fit. It needs {MemoryTable.MiB(bytes)}; of CoServingOptions.DeviceBytesMax, {MemoryTable.MiB(BytesMax)}, " +
            $"{MemoryTable.MiB(Math.Max(0, BytesFree))} are free and the KV cache can spare {MemoryTable.MiB(BytesLendable)}.\n" +
            $"{needs}{advice(attainable)}");
    }

    /// <summary>The error of a device that has less memory than its budget says.</summary>
    /// <param name="where">What it was doing, such as "inside a step".</param>
    /// <param name="fault">What the backend threw.</param>
    public static InsufficientMemoryException RanOut(string where, Exception fault) =>
        new($"The device ran out of memory {where}: {fault.Message.Split('\n')[0]}", fault);

    /// <summary>
    /// Leaves the device more memory than the budget says, after an operation found too little: what is held without need, else the
    /// last extent of the KV cache. False where neither can be had.
    /// </summary>
    public bool TryLeave()
    {
        int blocks = _pool.SizeWithout(1);
        if (_relinquish())
        {
            return true;
        }

        if (blocks < Floor)
        {
            return false;
        }

        _vacate(blocks);
        try
        {
            _pool.Resize(blocks);
        }
        catch (OutOfMemoryException)
        {
            return false;
        }

        _bytesAtFailure = _backend.AllocatedBytes;
        return true;
    }

    /// <summary>Lets the KV cache have what is free, up to its full size.</summary>
    public void GiveBack()
    {
        if (_pool.Blocks.BlocksTotal == _pool.BlocksMax || BytesFree < _pool.BlockBytes || _backend.AllocatedBytes == _bytesAtFailure)
        {
            return;
        }

        int blocks = _pool.SizeWithout(-BytesFree);
        if (blocks <= _pool.Blocks.BlocksTotal)
        {
            return;
        }

        try
        {
            _pool.Resize(blocks);
            _bytesAtFailure = -1;
        }
        catch (OutOfMemoryException)
        {
            // The machine has less than the budget says. A smaller cache serves too; try again when something has changed.
            _bytesAtFailure = _backend.AllocatedBytes;
        }
    }
}
