using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.KvCache;

/// <summary>
/// The blocks of one sequence in position order: position p lives in block Blocks[p / 16] at offset p % 16. All its blocks
/// come from one pool.
/// </summary>
internal sealed class BlockTable
{
    private const int Unused = -1; // An attention kernel that reads past the end fails instead of reading a stranger's block.

    private int[] _blocks = [];
    private BlockPool? _pool;

    /// <summary>Block indices, as <see cref="AttentionSegment.BlockTable"/> takes them; entries from Count on are -1.</summary>
    /// <remarks>Growth replaces the array: read it again after <see cref="EnsureCapacity"/>.</remarks>
    public int[] Blocks => _blocks;

    /// <summary>Blocks held.</summary>
    public int Count { get; private set; }

    /// <summary>Positions that the held blocks can store.</summary>
    public int TokenCapacity => Count * DeviceKvCache.TokensPerBlock;

    /// <summary>Whether it holds that block of the cache or one behind it.</summary>
    public bool HoldsFrom(int block) => _blocks.AsSpan(0, Count).IndexOfAnyInRange(block, int.MaxValue) >= 0;

    /// <summary>Blocks that this many positions need.</summary>
    public static int BlocksFor(int tokens)
    {
        Check.That(tokens >= 0);
        return (int)(((long)tokens + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock);
    }

    /// <summary>Grows to hold this many positions. False, with nothing taken, where the pool has too few free blocks.</summary>
    public bool EnsureCapacity(int tokens, BlockPool pool)
    {
        Check.That(_pool is null || _pool == pool);
        int needed = BlocksFor(tokens);
        if (needed - Count > pool.BlocksFree)
        {
            return false;
        }

        Reserve(needed, pool);
        _pool = pool;
        while (Count < needed)
        {
            _blocks[Count++] = pool.Allocate();
        }

        return true;
    }

    /// <summary>Appends a block that others hold too, or that is idle; the blocks so far are full.</summary>
    public void Share(int block, BlockPool pool)
    {
        Check.That(_pool is null || _pool == pool);
        _pool = pool;
        pool.Hold(block);
        Reserve(Count + 1, pool);
        _blocks[Count++] = block;
    }

    /// <summary>Holds another block with the same contents in the place of its own.</summary>
    public void Replace(int index, int block, BlockPool pool)
    {
        Check.That(_pool == pool && index < Count && _blocks[index] != block);
        pool.Hold(block);
        pool.Free(_blocks[index]);
        _blocks[index] = block;
    }

    /// <summary>How many of its blocks others hold too; they come first.</summary>
    public int SharedOf(BlockPool pool)
    {
        int low = 0;
        int high = Count;
        while (low < high)
        {
            int middle = (low + high) / 2;
            (low, high) = pool.HoldersOf(_blocks[middle]) > 1 ? (middle + 1, high) : (low, middle);
        }

        return low;
    }

    /// <summary>Gives every block back; the table is empty and may be used again.</summary>
    public void Release(BlockPool pool)
    {
        Check.That(_pool is null || _pool == pool);
        while (Count > 0) // Last first: the next owner gets them in position order, and what others may share goes last.
        {
            pool.Free(_blocks[--Count]);
            _blocks[Count] = Unused;
        }

        _pool = null;
    }

    private void Reserve(int count, BlockPool pool)
    {
        if (count > _blocks.Length)
        {
            int used = _blocks.Length;
            Array.Resize(ref _blocks, Math.Max(count, Math.Min(2 * used, pool.BlocksTotal)));
            _blocks.AsSpan(used).Fill(Unused);
        }
    }
}
