using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>The law of bitwise determinism: cuts, company, repetition and threads change no bit.</summary>
internal static class DeterminismChecks
{
    public static IEnumerable<string> Names =>
        [.. SplitOperations.ByRows.Keys, .. SplitOperations.FromTheStart.Keys, .. SplitOperations.FromTheEnd.Keys];

    /// <summary>Again, row by row, and cut at random: always the bits of one call.</summary>
    public static void AnySplit(IComputeBackend backend, string name, int rows)
    {
        using var bench = new Workbench(backend);
        SplitRun run = Operation(name)(bench, rows);
        Matrix[] whole = run([new Part(0, rows)]);
        foreach ((string what, Part[] parts) in Splits(rows))
        {
            if (SplitOperations.FromTheEnd.ContainsKey(name))
            {
                Array.Reverse(parts);
            }

            Compare($"{name}, {what}", run(parts), whole);
        }

        bench.Verify();
    }

    /// <summary>Rows that are work enough for several threads.</summary>
    public static int RowsForThreads(string name) =>
        SplitOperations.Light.Contains(name) ? 1100 : name == "Attention of many sequences" ? 60 : 130;

    /// <summary>Backends, which differ in threads only, compute the same bits.</summary>
    public static void SameBits(string name, int rows, params IComputeBackend[] backends)
    {
        Matrix[][] all = [.. backends.Select(backend =>
        {
            using var bench = new Workbench(backend);
            return Operation(name)(bench, rows)([new Part(0, rows)]);
        })];
        for (int i = 1; i < all.Length; i++)
        {
            Compare($"{name}, {backends[i].Name}", all[i], all[0]);
        }
    }

    private static Func<Workbench, int, SplitRun> Operation(string name) =>
        SplitOperations.ByRows.GetValueOrDefault(name)
        ?? SplitOperations.FromTheStart.GetValueOrDefault(name)
        ?? SplitOperations.FromTheEnd[name];

    private static void Compare(string what, Matrix[] actual, Matrix[] expected)
    {
        for (int i = 0; i < expected.Length; i++)
        {
            Expect.SameBits($"{what}, output {i}", actual[i], expected[i]);
        }
    }

    private static IEnumerable<(string What, Part[] Parts)> Splits(int rows)
    {
        yield return ("again", [new Part(0, rows)]);
        yield return ("row by row", [.. Enumerable.Range(0, rows).Select(row => new Part(row, 1))]);
        var random = new SeededRandom(3);
        for (int trial = 0; trial < 3; trial++)
        {
            var parts = new List<Part>();
            for (int row = 0; row < rows; row += parts[^1].Count)
            {
                parts.Add(new Part(row, random.Next(1, Math.Min(rows - row, 24) + 1)));
            }

            yield return ($"cut into {string.Join('+', parts.Select(part => part.Count))}", [.. parts]);
        }
    }
}
