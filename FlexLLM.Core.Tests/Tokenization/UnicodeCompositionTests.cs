using FlexLLM.Primitives;
using FlexLLM.Tokenization;
using NUnit.Framework;

namespace FlexLLM.Tests.Tokenization;

[TestFixture]
internal sealed class UnicodeCompositionTests
{
    // Source, form C, form D: rows of the Unicode Character Database's NormalizationTest.txt, one of each sort.
    [TestCase("caf\u00E9", "caf\u00E9", "cafe\u0301")]
    [TestCase("\u1E0A\u0323", "\u1E0C\u0307", "D\u0323\u0307", TestName = "marks reorder, then compose")]
    [TestCase("\u1E0A\u031B\u0323", "\u1E0C\u031B\u0307", "D\u031B\u0323\u0307", TestName = "a composition reaches over a mark")]
    [TestCase("\u212B", "\u00C5", "A\u030A", TestName = "singleton, two steps")]
    [TestCase("\u0958", "\u0915\u093C", "\u0915\u093C", TestName = "excluded from composition")]
    [TestCase("\u0344", "\u0308\u0301", "\u0308\u0301", TestName = "decomposition that starts with a mark")]
    [TestCase("\u1E9B\u0323", "\u1E9B\u0323", "\u017F\u0323\u0307", TestName = "decomposition that does not come back")]
    [TestCase("\uAC00\u11A8", "\uAC01", "\u1100\u1161\u11A8", TestName = "Hangul syllable and trailing letter")]
    [TestCase("\u1100\u1161\u11A7", "\uAC00\u11A7", "\u1100\u1161\u11A7", TestName = "Hangul trailing base is none")]
    [TestCase("\uAC01\u11A8", "\uAC01\u11A8", "\u1100\u1161\u11A8\u11A8", TestName = "Hangul syllable that is full")]
    [TestCase("\uF900\uFA30", "\u8C48\u4FAE", "\u8C48\u4FAE", TestName = "compatibility ideographs")]
    [TestCase("\U0002F800", "\u4E3D", "\u4E3D", TestName = "ideograph beyond the basic plane")]
    [TestCase("\U0001D15E", "\U0001D157\U0001D165", "\U0001D157\U0001D165", TestName = "excluded beyond the basic plane")]
    [TestCase("\U00011131\U00011127", "\U0001112E", "\U00011131\U00011127", TestName = "composes beyond the basic plane")]
    [TestCase("\U00016D63\U00016D68", "\U00016D6A", "\U00016D63\U00016D67\U00016D67", TestName = "a pair comes apart to compose")]
    [TestCase("a\u0315\u0300\u05AE\u0062", "\u00E0\u05AE\u0315b", "a\u05AE\u0300\u0315b", TestName = "four classes in a row")]
    [TestCase("\uFB01\u00B2", "\uFB01\u00B2", "\uFB01\u00B2", TestName = "compatibility forms stay")]
    public void Compose_And_Decompose_TestRow_GiveItsForms(string source, string composed, string decomposed)
    {
        Assert.Multiple(() =>
        {
            foreach (string form in (string[])[source, composed, decomposed])
            {
                Assert.That(UnicodeComposition.Compose(form), Is.EqualTo(composed));
                Assert.That(UnicodeComposition.Decompose(form), Is.EqualTo(decomposed));
            }
        });
    }

    [Test]
    public void Compose_RandomText_IsStableAndTheSameFromEachForm()
    {
        SeededRandom random = new(2);
        Assert.Multiple(() =>
        {
            for (int i = 0; i < 2000; i++)
            {
                string text = SmallTokenizers.RandomText(ref random, 20);
                string composed = UnicodeComposition.Compose(text);
                string decomposed = UnicodeComposition.Decompose(text);
                Assert.That(UnicodeComposition.Compose(composed), Is.EqualTo(composed));
                Assert.That(UnicodeComposition.Decompose(decomposed), Is.EqualTo(decomposed));
                Assert.That(UnicodeComposition.Compose(decomposed), Is.EqualTo(composed));
                Assert.That(UnicodeComposition.Decompose(composed), Is.EqualTo(decomposed));
            }
        });
    }

    [Test]
    public void Compose_EveryHangulSyllable_ComesBack()
    {
        for (char syllable = '\uAC00'; syllable <= '\uD7A3'; syllable++)
        {
            string letters = UnicodeComposition.Decompose(syllable.ToString());
            Assert.That(letters.All(c => c is >= '\u1100' and < '\u1200'));
            Assert.That(UnicodeComposition.Compose(letters), Is.EqualTo(syllable.ToString()));
        }
    }

    [Test]
    public void Compose_LongRunOfMarks_SortsThem()
    {
        string text = "a" + string.Concat(Enumerable.Repeat("\u0301\u0323", 50_000));
        string sorted = "\u1EA1" + new string('\u0323', 49_999) + new string('\u0301', 50_000);
        Assert.That(UnicodeComposition.Compose(text), Is.EqualTo(sorted));
    }
}
