namespace FlexLLM.Scheduling;

/// <summary>Search in a monotone predicate.</summary>
internal static class Bisection
{
    /// <summary>The largest n in 1..max that fits, 0 where none does; whatever fits, fits for every smaller n too.</summary>
    public static int Largest(int max, Func<int, bool> fits)
    {
        int low = 0;
        int high = Math.Max(0, max);
        while (low < high)
        {
            int middle = low + ((high - low + 1) / 2);
            if (fits(middle))
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
