using System.Text;
using FlexLLM.Execution;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Execution;

[TestFixture]
internal sealed class StopMatcherTests
{
    [Test]
    public void Append_StopInOnePiece_CutsBeforeIt()
    {
        var matcher = new StopMatcher(new StopSequences(["END"]));

        Assert.That(matcher.Append("the END of"), Is.EqualTo("the "));
        Assert.That(matcher.Matched, Is.EqualTo("END"));
    }

    [Test]
    public void Append_PossibleBeginning_IsHeldBackThenReleased()
    {
        var matcher = new StopMatcher(new StopSequences(["<|end|>"]));

        Assert.That(matcher.Append("a<|e"), Is.EqualTo("a"));
        Assert.That(matcher.Append("n"), Is.Empty);
        Assert.That(matcher.Append("t"), Is.EqualTo("<|ent"));
        Assert.That(matcher.Append("<"), Is.Empty);
        Assert.That(matcher.Flush(), Is.EqualTo("<"));
        Assert.That(matcher.Stopped, Is.False);
    }

    [Test]
    public void Append_SelfOverlappingStop_IsFound()
    {
        var matcher = new StopMatcher(new StopSequences(["aab"]));

        Assert.That(matcher.Append("aa") + matcher.Append("aab"), Is.EqualTo("aa"));
        Assert.That(matcher.Stopped, Is.True);
    }

    [Test]
    public void Append_TwoStopsEndTogether_TheLongerIsCut()
    {
        var matcher = new StopMatcher(new StopSequences(["b", "ab"]));

        Assert.That(matcher.Append("xab"), Is.EqualTo("x"));
        Assert.That(matcher.Matched, Is.EqualTo("ab"));
    }

    [Test]
    public void Append_NoStops_PassesTextOn()
    {
        var matcher = new StopMatcher(StopSequences.None);

        Assert.That(matcher.Append("text"), Is.EqualTo("text"));
        Assert.That(matcher.Flush(), Is.Empty);
    }

    [Test]
    public void StopSequences_UnusableString_IsRefused()
    {
        Assert.That(() => new StopSequences([""]), Throws.ArgumentException);
        Assert.That(() => new StopSequences([new string('x', 257)]), Throws.ArgumentException);
        Assert.That(() => new StopSequences(["\uDE00"]), Throws.ArgumentException);
        Assert.That(() => new StopSequences([.. Enumerable.Repeat("x", 17)]), Throws.ArgumentException);
    }

    [Test]
    public void Append_RandomPieces_AgreesWithWholeTextSearch([Range(1, 20)] int seed)
    {
        var random = new SeededRandom((ulong)seed);
        for (int i = 0; i < 200; i++)
        {
            (string[] stops, string text) = RandomCase(ref random);
            string streamed = Streamed(stops, text, ref random);
            Assert.That(streamed, Is.EqualTo(WholeText(stops, text)), $"[{string.Join(',', stops)}] in {text}");
        }
    }

    [Test]
    public void WholeTextSearch_WithoutTheLastStop_IsDetected()
    {
        var random = new SeededRandom(1);
        int differ = 0;
        for (int i = 0; i < 200; i++)
        {
            (string[] stops, string text) = RandomCase(ref random);
            differ += Streamed(stops, text, ref random) == WholeText(stops[..^1], text) ? 0 : 1;
        }

        Assert.That(differ, Is.GreaterThan(20));
    }

    private static (string[] Stops, string Text) RandomCase(ref SeededRandom random)
    {
        string[] stops = new string[random.Next(1, 4)];
        for (int i = 0; i < stops.Length; i++)
        {
            stops[i] = RandomText(ref random, random.Next(1, 6));
        }

        return (stops, RandomText(ref random, random.Next(40)));
    }

    private static string RandomText(ref SeededRandom random, int length)
    {
        var text = new StringBuilder();
        for (int i = 0; i < length; i++)
        {
            text.Append((char)('a' + random.Next(3)));
        }

        return text.ToString();
    }

    private static string Streamed(string[] stops, string text, ref SeededRandom random)
    {
        var matcher = new StopMatcher(new StopSequences(stops));
        var shown = new StringBuilder();
        int at = 0;
        while (at < text.Length && !matcher.Stopped)
        {
            int length = Math.Min(random.Next(6), text.Length - at);
            shown.Append(matcher.Append(text.Substring(at, length)));
            at += length;
        }

        return shown.Append(matcher.Flush()) + (matcher.Stopped ? "|" : "");
    }

    private static string WholeText(string[] stops, string text)
    {
        for (int end = 1; end <= text.Length; end++)
        {
            IEnumerable<string> found = stops.Where(s => text[..end].EndsWith(s, StringComparison.Ordinal));
            int longest = found.Select(s => s.Length).DefaultIfEmpty().Max();
            if (longest > 0)
            {
                return text[..(end - longest)] + "|";
            }
        }

        return text;
    }
}
