using System.Numerics;
using FlexLLM.Primitives;

namespace FlexLLM.KvCache;

/// <summary>
/// Hands out the blocks of a paged key/value cache by index, 0..<see cref="BlocksTotal"/>-1, always the lowest that is free: a
/// lightly used pool leaves its end alone, which is where it shrinks. The same calls give the same indices. One thread at a time.
/// </summary>
internal sealed class BlockPool
{
    private const int BitsPerWord = 64;

    private ulong[] _free; // Bit b of word w: block 64 w + b is free.
    private int _firstWord; // No word before it has a free block.
    private int _freeCount;
    private int _heldCount;

    /// <summary>A pool in which every block is free.</summary>
    public BlockPool(int blocksTotal)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(blocksTotal);
        _free = [];
        Grow(blocksTotal);
    }

    /// <summary>Blocks in the cache.</summary>
    public int BlocksTotal { get; private set; }

    /// <summary>Blocks that nobody holds.</summary>
    public int BlocksFree => _freeCount;

    /// <summary>Blocks handed out and not yet given back.</summary>
    public int BlocksHeld => _heldCount;

    /// <summary>Takes one block. The caller knows that one is free.</summary>
    public int Allocate()
    {
        Check.That(_freeCount > 0);
        while (_free[_firstWord] == 0)
        {
            _firstWord++;
        }

        int block = (_firstWord * BitsPerWord) + BitOperations.TrailingZeroCount(_free[_firstWord]);
        Check.That(block < BlocksTotal);
        Flip(block);
        _freeCount--;
        _heldCount++;
        Check.That(_freeCount + _heldCount == BlocksTotal);
        return block;
    }

    /// <summary>Gives a held block back.</summary>
    public void Free(int block)
    {
        Check.That(IsHeld(block));
        Flip(block);
        _firstWord = Math.Min(_firstWord, block / BitsPerWord);
        _freeCount++;
        _heldCount--;
        Check.That(_freeCount + _heldCount == BlocksTotal);
    }

    /// <summary>Whether a block is handed out; one that the pool does not have is not.</summary>
    public bool IsHeld(int block) => (uint)block < (uint)BlocksTotal && !IsFree(block);

    /// <summary>Adds free blocks behind the last.</summary>
    public void Grow(int blocksTotal)
    {
        Check.That(blocksTotal >= BlocksTotal);
        Array.Resize(ref _free, Math.Max(_free.Length, (blocksTotal + BitsPerWord - 1) / BitsPerWord));
        for (int block = BlocksTotal; block < blocksTotal; block++)
        {
            Check.That(!IsFree(block));
            Flip(block);
        }

        _firstWord = Math.Min(_firstWord, BlocksTotal / BitsPerWord);
        _freeCount += blocksTotal - BlocksTotal;
        BlocksTotal = blocksTotal;
        Check.That(_freeCount + _heldCount == BlocksTotal);
    }

    /// <summary>Takes away the blocks from <paramref name="blocksTotal"/> on, none of which anybody may hold.</summary>
    public void Shrink(int blocksTotal)
    {
        Check.That(blocksTotal >= 0 && blocksTotal <= BlocksTotal);
        for (int block = blocksTotal; block < BlocksTotal; block++)
        {
            Check.That(IsFree(block), "a block that somebody holds stays");
            Flip(block);
        }

        _freeCount -= BlocksTotal - blocksTotal;
        BlocksTotal = blocksTotal;
        Check.That(_freeCount + _heldCount == BlocksTotal);
    }

    private bool IsFree(int block) => (_free[block / BitsPerWord] & (1UL << (block % BitsPerWord))) != 0;

    private void Flip(int block) => _free[block / BitsPerWord] ^= 1UL << (block % BitsPerWord);
}
