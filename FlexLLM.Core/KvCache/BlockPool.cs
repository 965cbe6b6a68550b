using FlexLLM.Primitives;

namespace FlexLLM.KvCache;

/// <summary>
/// Hands out the blocks of a paged key/value cache by index, 0..<see cref="BlocksTotal"/>-1. The block freed last is handed
/// out first, a fresh pool starts at 0: the same calls give the same indices. One thread at a time.
/// </summary>
internal sealed class BlockPool
{
    private readonly int[] _free; // A stack: its top is _free[_freeCount - 1].
    private readonly bool[] _held;
    private int _freeCount;
    private int _heldCount;

    /// <summary>A pool in which every block is free.</summary>
    public BlockPool(int blocksTotal)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(blocksTotal);
        _free = new int[blocksTotal];
        _held = new bool[blocksTotal];
        _freeCount = blocksTotal;
        for (int i = 0; i < blocksTotal; i++)
        {
            _free[i] = blocksTotal - 1 - i;
        }
    }

    /// <summary>Blocks in the cache.</summary>
    public int BlocksTotal => _free.Length;

    /// <summary>Blocks that nobody holds.</summary>
    public int BlocksFree => _freeCount;

    /// <summary>Blocks handed out and not yet given back.</summary>
    public int BlocksHeld => _heldCount;

    /// <summary>Takes one block. The caller knows that one is free.</summary>
    public int Allocate()
    {
        Check.That(_freeCount > 0);
        int block = _free[--_freeCount];
        Check.That(!_held[block]);
        _held[block] = true;
        _heldCount++;
        Check.That(_freeCount + _heldCount == BlocksTotal);
        return block;
    }

    /// <summary>Gives a held block back.</summary>
    public void Free(int block)
    {
        Check.That((uint)block < (uint)BlocksTotal);
        Check.That(_held[block]);
        _held[block] = false;
        _heldCount--;
        _free[_freeCount++] = block;
        Check.That(_freeCount + _heldCount == BlocksTotal);
    }
}
