using FlexLLM.KvCache;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// Numbers for all positions of sequences that follow from their block tables, and the table as the key that they are kept under: what
/// kind they are, how many positions, and of each sequence its length and its blocks.
/// </summary>
/// <param name="marker">Negative, and each kind's own: no key is then another's, nor a list of indices.</param>
/// <param name="write">Writes those of one sequence, which may be shorter than the longest.</param>
/// <param name="isMask">See <see cref="IsMask"/>.</param>
internal sealed class SequenceIndices(int marker, SequenceIndices.Writer write, bool isMask = false)
{
    /// <summary>They are zeros and ones, and kept as a mask of what is one.</summary>
    public bool IsMask => isMask;

    /// <summary>Writes the numbers of one sequence of so many positions, and what fills it up.</summary>
    public delegate void Writer(in AttentionSegment segment, int length, Span<long> values);

    /// <summary>How many numbers the key of so many sequences has at most, each cut off at a position.</summary>
    public static int KeyLengthMax(int sequences, int end) => 2 + (sequences * (1 + BlockTable.BlocksFor(end)));

    /// <summary>Writes the key and tells its length.</summary>
    public int WriteKey(ReadOnlySpan<AttentionSegment> segments, int end, Span<long> key)
    {
        (key[0], key[1]) = (marker, end);
        int at = 2;
        foreach (ref readonly AttentionSegment segment in segments)
        {
            int length = LengthOf(segment, end);
            key[at++] = length;
            int blocks = BlockTable.BlocksFor(length);
            Check.That(blocks <= segment.BlockTable.Length);
            foreach (int block in segment.BlockTable.AsSpan(0, blocks))
            {
                Check.That((uint)block < (uint)segment.Cache.Blocks);
                key[at++] = block;
            }
        }

        return at;
    }

    /// <summary>The numbers, [sequences * end].</summary>
    public void Write(ReadOnlySpan<AttentionSegment> segments, int end, Span<long> values)
    {
        for (int i = 0; i < segments.Length; i++)
        {
            write(segments[i], LengthOf(segments[i], end), values.Slice(i * end, end));
        }
    }

    private static int LengthOf(in AttentionSegment segment, int end) => Math.Min(end, segment.PositionStart + segment.RowCount);
}
