using System.Globalization;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>Comparisons of whole matrices that fail once, naming the worst element.</summary>
internal static class Expect
{
    /// <summary>Half the spacing of F32 at 1: the largest relative error of one rounding.</summary>
    private const double UnitRoundoff = 1.0 / (1 << 24);

    /// <summary>The same of BF16.</summary>
    private const double Bf16Roundoff = 1.0 / (1 << 8);

    /// <summary>
    /// Roundings, in units of 2^-24 of the magnitude, that chained sums of so many terms may collect: 4 sqrt(k) for each
    /// sum (independent roundings walk at random) and a few for what is done to each element.
    /// </summary>
    public static double Roundings(params int[] terms) => 8 + terms.Sum(k => 4 * Math.Sqrt(k));

    /// <summary>
    /// |actual - expected| is at most roundings * 2^-24 * magnitude, and so many roundings to BF16 more where that was written; element by
    /// element; NaN never passes.
    /// </summary>
    public static void Close(string what, Matrix actual, Matrix expected, Matrix magnitude, double roundings, int bf16Roundings = 1)
    {
        SameShape(what, actual, expected);
        double relative = (roundings * UnitRoundoff) + (actual.Type == DType.BF16 ? bf16Roundings * Bf16Roundoff : 0);
        double worst = 0;
        int worstAt = -1;
        for (int i = 0; i < expected.Values.Length; i++)
        {
            // The smallest normal F32 stands for results that underflow.
            double allowed = (relative * magnitude.Values[i]) + 1.2e-38;
            double excess = Math.Abs(actual.Values[i] - expected.Values[i]) / allowed;
            if (!(excess <= 1) && !(excess <= worst))
            {
                (worst, worstAt) = (excess, i);
            }
        }

        if (worstAt >= 0)
        {
            Fail(what, actual, expected, worstAt, $"{worst:G3} times the allowed error");
        }
    }

    /// <summary>
    /// Every element has the very bits of its counterpart; where BF16 was written those of the nearest BF16, and NaN is NaN.
    /// </summary>
    public static void SameBits(string what, Matrix actual, Matrix expected)
    {
        SameShape(what, actual, expected);
        bool isNarrow = actual.Type == DType.BF16;
        expected = isNarrow ? expected.Rounded(DType.BF16) : expected;
        for (int i = 0; i < expected.Values.Length; i++)
        {
            if (BitConverter.DoubleToInt64Bits(actual.Values[i]) != BitConverter.DoubleToInt64Bits(expected.Values[i]) &&
                !(isNarrow && double.IsNaN(actual.Values[i]) && double.IsNaN(expected.Values[i])))
            {
                Fail(what, actual, expected, i, "other bits");
            }
        }
    }

    private static void SameShape(string what, Matrix actual, Matrix expected) =>
        Assert.That((actual.Rows, actual.Columns), Is.EqualTo((expected.Rows, expected.Columns)), $"{what}: shape");

    private static void Fail(string what, Matrix actual, Matrix expected, int at, string fault) =>
        Assert.Fail(string.Create(
            CultureInfo.InvariantCulture,
            $"{what} [{actual.Rows}, {actual.Columns}] at ({at / actual.Columns}, {at % actual.Columns}): " +
            $"got {actual.Values[at]:G9}, expected {expected.Values[at]:G9}, {fault}"));
}
