using System.Numerics;
using FlexLLM.Primitives;

namespace FlexLLM.Tokenization;

/// <summary>
/// Ranks of pairs of ids: a hash table with linear probing, built once and then only read. Encoding is mostly look-ups here.
/// </summary>
internal sealed class PairRanks
{
    private const ulong Free = ulong.MaxValue;

    private readonly ulong[] _keys;
    private readonly int[] _ranks;
    private readonly int _shift;
    private int _count;

    /// <param name="capacity">The most pairs that will be set.</param>
    public PairRanks(int capacity)
    {
        int bits = BitOperations.Log2((uint)capacity + 1) + 2; // Less than half full.
        _keys = new ulong[1 << bits];
        _ranks = new int[1 << bits];
        _shift = 64 - bits;
        Array.Fill(_keys, Free);
    }

    /// <summary>Sets the rank of a pair; a later rank takes the place of an earlier one.</summary>
    public void Set(int left, int right, int rank)
    {
        ulong key = KeyOf(left, right);
        int slot = SlotOf(key);
        if (_keys[slot] == Free)
        {
            _count++;
            Check.That(_count < _keys.Length);
        }

        _keys[slot] = key;
        _ranks[slot] = rank;
    }

    /// <summary>Rank of a pair, or -1.</summary>
    public int Find(int left, int right)
    {
        ulong key = KeyOf(left, right);
        int slot = SlotOf(key);
        return _keys[slot] == key ? _ranks[slot] : -1;
    }

    private static ulong KeyOf(int left, int right) => ((ulong)(uint)left << 32) | (uint)right;

    /// <summary>The slot that holds the key, or the free one where it would go.</summary>
    private int SlotOf(ulong key)
    {
        int slot = (int)((key * 0x9E3779B97F4A7C15) >> _shift);
        while (_keys[slot] != key && _keys[slot] != Free)
        {
            slot = (slot + 1) & (_keys.Length - 1);
        }

        return slot;
    }
}
