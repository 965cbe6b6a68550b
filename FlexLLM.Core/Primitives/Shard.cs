namespace FlexLLM.Primitives;

/// <summary>
/// Indices [Start, Start + Count) of something that is divided among ranks. The one rule of division: rank r of p has
/// [size r / p, size (r + 1) / p), which is even where p divides the size, ragged by one elsewhere, and empty for some ranks where
/// the size is below p.
/// </summary>
internal readonly record struct Shard(int Start, int Count)
{
    public int End => Start + Count;

    /// <summary>Undivided.</summary>
    public static Shard All(int size) => new(0, size);

    /// <summary>What one rank has of <paramref name="size"/>.</summary>
    public static Shard Of(int size, int rank, int ranks)
    {
        Check.That(size >= 0);
        Check.That(rank >= 0 && rank < ranks);
        int start = (int)((long)size * rank / ranks);
        return new Shard(start, (int)((long)size * (rank + 1) / ranks) - start);
    }

    /// <summary>What both contain; empty where they do not meet.</summary>
    public Shard Intersect(Shard other)
    {
        int start = Math.Max(Start, other.Start);
        return new Shard(start, Math.Max(Math.Min(End, other.End) - start, 0));
    }
}
