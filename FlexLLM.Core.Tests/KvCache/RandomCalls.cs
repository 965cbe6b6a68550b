using FsCheck;
using FsCheck.Fluent;
using NUnit.Framework;

namespace FlexLLM.Tests.KvCache;

/// <summary>Sequences of calls for property tests, the same ones every time.</summary>
internal static class RandomCalls
{
    /// <summary>Calls of the kinds 0 to <paramref name="last"/>, each with a number that says which or how much.</summary>
    public static Arbitrary<(int What, int Number)[]> Of(int last) => (
        from what in Gen.Choose(0, last)
        from number in Gen.Choose(0, 1_000_000)
        select (what, number)).ArrayOf().ToArbitrary();

    /// <summary>Thrown directly: a failed NUnit assertion would be recorded even where a control expects it.</summary>
    public static void Require(bool condition, string what)
    {
        if (!condition)
        {
            throw new AssertionException($"Not kept: {what}.");
        }
    }
}
