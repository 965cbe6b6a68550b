using FlexLLM.Engine;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>How a report sums up errors that are known beforehand.</summary>
[TestFixture]
internal sealed class LatencyErrorReportTests
{
    // The i-th of the steps is off by i per mille, whichever way.
    [TestCase(1, 1, 1, 1)]
    [TestCase(2, 1, 2, 2)]
    [TestCase(20, 10, 19, 20)]
    [TestCase(100, 50, 95, 99)]
    [TestCase(101, 51, 96, 100)]
    [TestCase(1000, 500, 950, 990)]
    public void Of_KnownErrors_GivesTheLeastThatSoManyStayWithin(int steps, int median, int p95, int p99)
    {
        var errors = new List<(TimeSpan Expected, TimeSpan Most, TimeSpan Took)>();
        for (int i = 1; i <= steps; i++)
        {
            errors.Add((Milliseconds(1000 + (i % 2 == 0 ? i : -i)), Milliseconds(2000), Milliseconds(1000)));
        }

        var random = new SeededRandom(1);
        (TimeSpan, TimeSpan, TimeSpan)[] shuffled = [.. errors];
        random.Shuffle(shuffled.AsSpan());
        LatencyErrorReport report = LatencyErrorReport.Of(shuffled);

        Assert.That(report.Steps, Is.EqualTo(steps));
        Assert.That(report.Median, Is.EqualTo(median / 1000.0).Within(1e-12));
        Assert.That(report.P95, Is.EqualTo(p95 / 1000.0).Within(1e-12));
        Assert.That(report.P99, Is.EqualTo(p99 / 1000.0).Within(1e-12));
        Assert.That(report.ShareAbove, Is.Zero);
    }

    [Test]
    public void Of_ErrorsBothWays_AreSharesOfTheMeasuredTime()
    {
        LatencyErrorReport half = LatencyErrorReport.Of([(Milliseconds(10), Milliseconds(30), Milliseconds(20))]);
        LatencyErrorReport twice = LatencyErrorReport.Of([(Milliseconds(40), Milliseconds(50), Milliseconds(20))]);

        Assert.That((half.Median, twice.Median), Is.EqualTo((0.5, 1.0)));
    }

    [Test]
    public void Of_StepsAboveTheTimeToStayUnder_AreCounted()
    {
        LatencyErrorReport report = LatencyErrorReport.Of(
        [
            .. Enumerable.Range(1, 8).Select(i => (Milliseconds(i), Milliseconds(6), Milliseconds(i))),
        ]);

        Assert.That(report.ShareAbove, Is.EqualTo(2 / 8.0), "7 and 8; who takes just as long is not above");
        Assert.That(report.P99, Is.Zero);
    }

    [Test]
    public void Of_Nothing_IsZero() => Assert.That(LatencyErrorReport.Of([]), Is.EqualTo(new LatencyErrorReport(0, 0.0, 0.0, 0.0, 0.0)));

    private static TimeSpan Milliseconds(double milliseconds) => TimeSpan.FromMilliseconds(milliseconds);
}
