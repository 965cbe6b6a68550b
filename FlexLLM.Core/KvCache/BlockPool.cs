using System.Numerics;
using FlexLLM.Primitives;

namespace FlexLLM.KvCache;

/// <summary>
/// Hands out the blocks of a paged key/value cache by index, 0..<see cref="BlocksTotal"/>-1, always the lowest that is free: a
/// lightly used pool leaves its end alone, which is where it shrinks. Several may hold one block. A block whose contents are worth
/// keeping stays as it is when the last holder gives it back, until the pool has no other: it counts as free all the while. The
/// same calls give the same indices. One thread at a time.
/// </summary>
internal sealed class BlockPool
{
    private const int BitsPerWord = 64;
    private const int None = -1;

    private ulong[] _free; // Bit b of word w: block 64 w + b is free and empty.
    private BlockState[] _blocks = [];
    private int _firstWord; // No word before it has a free block.
    private int _emptyCount;
    private int _idleCount;
    private int _heldCount;
    private int _oldestIdle = None;
    private int _newestIdle = None;

    /// <summary>A pool in which every block is free.</summary>
    public BlockPool(int blocksTotal)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(blocksTotal);
        _free = [];
        Grow(blocksTotal);
    }

    /// <summary>Called when a kept block loses its contents, before anybody gets it.</summary>
    public Action<int>? OnDropped { get; set; }

    /// <summary>Blocks in the cache.</summary>
    public int BlocksTotal { get; private set; }

    /// <summary>Blocks that nobody holds, kept ones among them.</summary>
    public int BlocksFree => _emptyCount + _idleCount;

    /// <summary>Blocks that somebody holds.</summary>
    public int BlocksHeld => _heldCount;

    /// <summary>Blocks that nobody holds and whose contents are still there.</summary>
    public int BlocksIdle => _idleCount;

    /// <summary>Takes one block. The caller knows that one is free.</summary>
    public int Allocate()
    {
        Check.That(BlocksFree > 0);
        if (_emptyCount == 0)
        {
            DropOldest();
        }

        while (_free[_firstWord] == 0)
        {
            _firstWord++;
        }

        int block = (_firstWord * BitsPerWord) + BitOperations.TrailingZeroCount(_free[_firstWord]);
        Check.That(block < BlocksTotal);
        Flip(block);
        _emptyCount--;
        _blocks[block] = new BlockState { Holders = 1 };
        _heldCount++;
        CheckCounts();
        return block;
    }

    /// <summary>One more holder of a block that is held or idle.</summary>
    public void Hold(int block)
    {
        Check.That(IsHeld(block) || IsIdle(block));
        ref BlockState state = ref _blocks[block];
        if (state.Holders++ == 0)
        {
            Unlink(block);
            _idleCount--;
            _heldCount++;
        }

        CheckCounts();
    }

    /// <summary>The contents of a held block are worth keeping from now on.</summary>
    public void Keep(int block)
    {
        Check.That(IsHeld(block));
        _blocks[block].IsKept = true;
    }

    /// <summary>
    /// Gives a held block back. Who depends on the contents of another block must give that back later: the pool drops what it keeps
    /// in the order in which it became idle.
    /// </summary>
    public void Free(int block)
    {
        Check.That(IsHeld(block));
        ref BlockState state = ref _blocks[block];
        if (--state.Holders > 0)
        {
            return;
        }

        _heldCount--;
        if (state.IsKept)
        {
            LinkNewest(block);
            _idleCount++;
        }
        else
        {
            MakeEmpty(block);
        }

        CheckCounts();
    }

    /// <summary>Whether somebody holds a block; one that the pool does not have is held by nobody.</summary>
    public bool IsHeld(int block) => HoldersOf(block) > 0;

    /// <summary>Whether a block is kept for nobody.</summary>
    public bool IsIdle(int block) => (uint)block < (uint)BlocksTotal && _blocks[block] is { IsKept: true, Holders: 0 };

    /// <summary>How many hold a block.</summary>
    public int HoldersOf(int block) => (uint)block < (uint)BlocksTotal ? _blocks[block].Holders : 0;

    /// <summary>Adds free blocks behind the last.</summary>
    public void Grow(int blocksTotal)
    {
        Check.That(blocksTotal >= BlocksTotal);
        Array.Resize(ref _free, Math.Max(_free.Length, (blocksTotal + BitsPerWord - 1) / BitsPerWord));
        Array.Resize(ref _blocks, Math.Max(_blocks.Length, blocksTotal));
        int before = BlocksTotal;
        BlocksTotal = blocksTotal;
        for (int block = before; block < blocksTotal; block++)
        {
            Check.That(!IsEmpty(block));
            MakeEmpty(block);
        }

        CheckCounts();
    }

    /// <summary>
    /// Takes away the blocks from <paramref name="blocksTotal"/> on, none of which anybody may hold. What is idle there loses its
    /// contents, and so does all that became idle before.
    /// </summary>
    public void Shrink(int blocksTotal)
    {
        Check.That(blocksTotal >= 0 && blocksTotal <= BlocksTotal);
        int idle = 0;
        for (int block = blocksTotal; block < BlocksTotal; block++)
        {
            Check.That(!IsHeld(block), "a block that somebody holds stays");
            idle += IsIdle(block) ? 1 : 0;
        }

        while (idle > 0)
        {
            idle -= DropOldest() >= blocksTotal ? 1 : 0;
        }

        for (int block = blocksTotal; block < BlocksTotal; block++)
        {
            Flip(block);
        }

        _emptyCount -= BlocksTotal - blocksTotal;
        BlocksTotal = blocksTotal;
        CheckCounts();
    }

    private int DropOldest()
    {
        int block = _oldestIdle;
        Check.That(IsIdle(block));
        Unlink(block);
        _idleCount--;
        OnDropped?.Invoke(block);
        MakeEmpty(block);
        return block;
    }

    private void MakeEmpty(int block)
    {
        _blocks[block] = default;
        Flip(block);
        _firstWord = Math.Min(_firstWord, block / BitsPerWord);
        _emptyCount++;
    }

    private void LinkNewest(int block)
    {
        ref BlockState state = ref _blocks[block];
        (state.Older, state.Newer) = (_newestIdle, None);
        if (_newestIdle == None)
        {
            _oldestIdle = block;
        }
        else
        {
            _blocks[_newestIdle].Newer = block;
        }

        _newestIdle = block;
    }

    private void Unlink(int block)
    {
        (int older, int newer) = (_blocks[block].Older, _blocks[block].Newer);
        if (older == None)
        {
            _oldestIdle = newer;
        }
        else
        {
            _blocks[older].Newer = newer;
        }

        if (newer == None)
        {
            _newestIdle = older;
        }
        else
        {
            _blocks[newer].Older = older;
        }
    }

    private void CheckCounts() => Check.That(_emptyCount + _idleCount + _heldCount == BlocksTotal);

    private bool IsEmpty(int block) => (_free[block / BitsPerWord] & (1UL << (block % BitsPerWord))) != 0;

    private void Flip(int block) => _free[block / BitsPerWord] ^= 1UL << (block % BitsPerWord);

    private struct BlockState
    {
        public int Holders;
        public bool IsKept;

        // Neighbours in the list of idle blocks.
        public int Older;
        public int Newer;
    }
}
