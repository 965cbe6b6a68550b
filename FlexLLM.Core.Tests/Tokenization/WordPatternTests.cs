using System.Text;
using System.Text.RegularExpressions;
using FlexLLM.Primitives;
using FlexLLM.Tokenization;
using NUnit.Framework;

namespace FlexLLM.Tests.Tokenization;

[TestFixture]
internal sealed class WordPatternTests
{
    private const string Gpt2 = @"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

    private const string Llama3 =
        @"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    private static readonly string[] Expressions = [Gpt2, Llama3, Llama3.Replace("{1,3}", string.Empty)];

    [TestCaseSource(nameof(Expressions))]
    public void NextEnd_TextWithinTheBasicPlane_CutsAsTheExpressionDoes(string expression)
    {
        SeededRandom random = new(1);
        Assert.Multiple(() =>
        {
            for (int i = 0; i < 3000; i++)
            {
                string text = BasicPlaneText(ref random);
                Assert.That(Cut(expression, text), Is.EqualTo(ByRegex(expression, text)), $"round {i}");
            }
        });
    }

    [Test]
    public void NextEnd_CompareWithAnotherExpression_Differs()
    {
        SeededRandom random = new(1);
        int different = 0;
        for (int i = 0; i < 300; i++)
        {
            string text = BasicPlaneText(ref random);
            different += Cut(Gpt2, text).SequenceEqual(ByRegex(Llama3, text)) ? 0 : 1;
        }

        Assert.That(different, Is.GreaterThan(100), "the comparison must be able to fail");
    }

    [TestCase("\U00010428\U00010400a1\U0001D7CE\U0001D7CF", "\U00010428\U00010400a", "1\U0001D7CE\U0001D7CF")]
    [TestCase("12345", "123", "45")]
    [TestCase("It\u2019s it'\u017Ft it'LL", "It", "\u2019s", " it", "'\u017F", "t", " it", "'LL")]
    [TestCase(" \n \n  x", " \n \n", " ", " x")]
    [TestCase("a!!\n\nb", "a", "!!\n\n", "b")]
    [TestCase("\U0001F600\U0001F601 \U0001F600", "\U0001F600\U0001F601", " \U0001F600")]
    public void NextEnd_Llama3_CutsByCodePoint(string text, params string[] words)
    {
        Assert.That(Cut(Llama3, text), Is.EqualTo(words));
    }

    [TestCase("")]
    [TestCase(@"\w+")]
    [TestCase(Gpt2 + " ")]
    [TestCase(@"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")]
    public void Recognize_UnknownExpression_GivesNull(string expression)
    {
        Assert.That(WordPattern.Recognize(expression), Is.Null);
    }

    private static List<string> Cut(string expression, string text)
    {
        WordPattern pattern = WordPattern.Recognize(expression)!;
        List<string> words = [];
        for (int start = 0; start < text.Length;)
        {
            int end = pattern.NextEnd(text, start);
            words.Add(text[start..end]);
            start = end;
        }

        return words;
    }

    private static List<string> ByRegex(string expression, string text) =>
        [.. Regex.Matches(text, expression, RegexOptions.CultureInvariant).Select(m => m.Value)];

    // Regex goes by UTF-16 unit, and knows no folding of U+017F.
    private static string BasicPlaneText(ref SeededRandom random)
    {
        StringBuilder text = new();
        foreach (Rune rune in SmallTokenizers.RandomText(ref random, 24).EnumerateRunes())
        {
            text.Append(rune.IsBmp && rune.Value != 0x17F ? rune.ToString() : " 's");
        }

        return text.ToString();
    }
}
