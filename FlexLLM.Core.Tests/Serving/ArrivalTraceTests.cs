using FlexLLM.Benchmarks.Serving;
using NUnit.Framework;

namespace FlexLLM.Tests.Serving;

/// <summary>Reading of arrival traces, and slices of them at other rates.</summary>
[TestFixture]
internal sealed class ArrivalTraceTests
{
    private const string Header = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

    [Test]
    public void Read_Rows_GivesSecondsFromTheFirst()
    {
        ArrivalTrace trace = Read("2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n2023-11-16 18:16:00,1,2");
        Assert.That(trace.Arrivals, Is.EqualTo(new TraceArrival[] { new(0, 374, 44), new(4.314579, 396, 109), new(13.31941, 1, 2) }));
        Assert.That(trace.Seconds, Is.EqualTo(13.31941));
    }

    [TestCase("", "line 2", "at least one arrival")]
    [TestCase("2023-11-16 18:15:46,3,4\n2023-11-16 18:15:45.9999999,3,4", "line 3", "sorted by time")]
    [TestCase("2023-11-16 18:15:46,3,4\n\n2023-11-16 18:15:47,3,4", "line 3", "fields")]
    [TestCase("2023-11-16 18:15:46,3", "line 2", "2 fields")]
    [TestCase("2023-11-16 18:15:46,3,4,5", "line 2", "4 fields")]
    [TestCase("yesterday,3,4", "line 2", "'yesterday' is no time")]
    [TestCase("2023-13-16 18:15:46,3,4", "line 2", "is no time")]
    [TestCase("2023-11-16 18:15:46,-3,4", "line 2", "ContextTokens '-3'")]
    [TestCase("2023-11-16 18:15:46,3,0", "line 2", "GeneratedTokens '0'")]
    [TestCase("2023-11-16 18:15:46,3,4.5", "line 2", "GeneratedTokens '4.5'")]
    [TestCase("2023-11-16 18:15:46,99999999999,4", "line 2", "ContextTokens '99999999999'")]
    public void Read_BrokenRow_NamesFileLineAndFault(string rows, string line, string fault)
    {
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => Read(rows))!;
        Assert.That((e.File, e.Field), Is.EqualTo(("trace.csv", line)));
        Assert.That(e.Fault, Does.Contain(fault));
    }

    [Test]
    public void Read_OtherHeader_NamesTheFirstLine()
    {
        using var reader = new StringReader("Timestamp,Model\n");
        Assert.That(
            () => ArrivalTrace.Read(reader, "trace.csv"),
            Throws.TypeOf<InvalidFileException>().With.Property(nameof(InvalidFileException.Field)).EqualTo("line 1"));
    }

    [Test]
    public void Read_MissingFile_IsNamed() =>
        Assert.That(() => ArrivalTrace.Read("nowhere.csv"), Throws.TypeOf<InvalidFileException>().With.Message.Contains("nowhere.csv"));

    [TestCase(0.3)]
    [TestCase(2.0)]
    [TestCase(3.7)]
    [TestCase(25.0)]
    public void Scaled_AnyRate_ReachesItWithinTheSlice(double rate)
    {
        ArrivalTrace scaled = Hour().Scaled(rate, 100, seed: 3, startSecond: 1000);
        Assert.That(scaled.Arrivals, Has.Count.EqualTo((int)Math.Round(rate * 100)));
        Assert.That((scaled.Seconds, scaled.Rate), Is.EqualTo((100.0, rate)));
        Assert.That(scaled.Arrivals.Select(a => a.Time), Is.Ordered.And.All.InRange(0.0, Math.BitDecrement(100.0)));
    }

    [TestCase(0.5)]
    [TestCase(8.0)]
    public void Scaled_AnyRate_KeepsTheShapeOfBursts(double rate)
    {
        ArrivalTrace slice = Hour().Scaled(2.0, 1200, seed: 0, startSecond: 600);
        ArrivalTrace scaled = Hour().Scaled(rate, 1200, seed: 5, startSecond: 600);
        Assert.That(ShareInBursts(scaled), Is.EqualTo(ShareInBursts(slice)).Within(0.05));
    }

    [Test]
    public void Scaled_SameSeed_GivesTheSame([Values(0.7, 9.0)] double rate)
    {
        ArrivalTrace once = Hour().Scaled(rate, 200, seed: 7);
        Assert.That(Hour().Scaled(rate, 200, seed: 7).Arrivals, Is.EqualTo(once.Arrivals));
        Assert.That(Hour().Scaled(rate, 200, seed: 8).Arrivals, Is.Not.EqualTo(once.Arrivals));
    }

    [Test]
    public void Scaled_MoreThanTheTrace_RepeatsEveryArrivalOftenAlike()
    {
        ArrivalTrace slice = Hour().Scaled(2.0, 100, seed: 0, startSecond: 500);
        ArrivalTrace scaled = Hour().Scaled(7.0, 100, seed: 1, startSecond: 500);
        int[] repeats = [.. slice.Arrivals.Select(a => scaled.Arrivals.Count(b => b.PromptTokens == a.PromptTokens))];
        Assert.That(repeats, Is.All.InRange(3, 4));
    }

    [Test]
    public void Scaled_Lengths_AreMultipliedThenCut()
    {
        var lengths = new TraceLengths(Factor: 0.25, MaxPrompt: 128, MaxAnswer: 64);
        TraceArrival[] cut = [.. new TraceArrival[] { new(0, 400, 100), new(1, 4000, 1000), new(2, 1, 1) }.Select(lengths.Apply)];
        Assert.That(cut, Is.EqualTo(new TraceArrival[] { new(0, 100, 25), new(1, 128, 64), new(2, 1, 1) }));
        Assert.That(
            Hour().Scaled(2.0, 100, seed: 0, lengths: lengths).Arrivals.Select(a => a.PromptTokens), Is.All.LessThanOrEqualTo(128));
    }

    [Test]
    public void Scaled_SliceThatIsNotThere_IsRefused()
    {
        Assert.That(() => Hour().Scaled(1, 4000, seed: 0), Throws.ArgumentException);
        Assert.That(() => Hour().Scaled(1, 100, seed: 0, startSecond: 3590), Throws.ArgumentException);
        Assert.That(() => Hour().Scaled(1, 0.001, seed: 0, startSecond: 599.9), Throws.ArgumentException);
        Assert.That(() => Hour().Scaled(0, 100, seed: 0), Throws.InstanceOf<ArgumentException>());
    }

    [Test]
    public void Read_AzureTraces_AreAnHourOfArrivals([Values("azure_llm_2023_conv.csv", "azure_llm_2023_code.csv")] string name)
    {
        ArrivalTrace trace = ArrivalTrace.Read(SharedData.Require("traces", name));
        Assert.That(trace.Arrivals, Has.Count.GreaterThan(8000));
        Assert.That(trace.Seconds, Is.EqualTo(3500).Within(200));
    }

    // Two arrivals a second, all of them in the first three of every ten seconds; prompts of distinct lengths.
    private static ArrivalTrace Hour()
    {
        IEnumerable<string> rows = Enumerable.Range(0, 7200).Select(i =>
            $"2023-11-16 18:{i / 120:00}:{(i / 20 * 10 % 60) + (i % 20 * 3 / 20):00}.{i % 20 * 3 % 20 * 5:00},{i + 1},100");
        return Read(string.Join('\n', rows.Append("2023-11-16 19:00:00,7201,100")));
    }

    private static double ShareInBursts(ArrivalTrace trace) =>
        trace.Arrivals.Count(a => a.Time % 10 < 3.05) / (double)trace.Arrivals.Count;

    private static ArrivalTrace Read(string rows)
    {
        using var reader = new StringReader(Header + rows);
        return ArrivalTrace.Read(reader, "trace.csv");
    }
}
