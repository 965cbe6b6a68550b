namespace FlexLLM.Scheduling;

/// <summary>Whether a size fits, given what it depends on; a static lambda of this type costs no allocation.</summary>
internal delegate bool SizeFits<TState>(in TState state, int size);

/// <summary>Search in a monotone predicate.</summary>
internal static class Bisection
{
    /// <inheritdoc cref="Largest{TState}"/>
    public static int Largest(int max, Func<int, bool> fits) => Largest(max, fits, static (in Func<int, bool> f, int n) => f(n));

    /// <summary>The largest n in 1..max that fits, 0 where none does; whatever fits, fits for every smaller n too.</summary>
    public static int Largest<TState>(int max, in TState state, SizeFits<TState> fits)
    {
        int low = 0;
        int high = Math.Max(0, max);
        while (low < high)
        {
            int middle = low + ((high - low + 1) / 2);
            if (fits(state, middle))
            {
                low = middle;
            }
            else
            {
                high = middle - 1;
            }
        }

        return low;
    }
}
