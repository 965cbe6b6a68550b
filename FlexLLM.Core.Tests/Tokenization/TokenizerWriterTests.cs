using FlexLLM.Tokenization;
using NUnit.Framework;

namespace FlexLLM.Tests.Tokenization;

[TestFixture]
internal sealed class TokenizerWriterTests
{
    [Test]
    public void Write_NoMerges_EncodesBytes()
    {
        Tokenizer tokenizer = SmallTokenizers.LoadByteLevel(0);
        Assert.Multiple(() =>
        {
            Assert.That(tokenizer.VocabularySize, Is.EqualTo(259));
            Assert.That(tokenizer.Encode("a\u00E9 "), Is.EqualTo((int[])[0x61, 0xC3, 0xA9, 0x20]));
            Assert.That(tokenizer.EosId, Is.EqualTo(tokenizer.IdOf("<|im_end|>")));
            Assert.That(tokenizer.BosId, Is.Null);
        });
    }

    [Test]
    public void Write_LargerVocabulary_FillsWithReservedTokens()
    {
        Tokenizer tokenizer = SmallTokenizers.InFolder(folder =>
        {
            TokenizerWriter.Write(folder, [(0x61, 0x62)], vocabularySize: 300);
            Assert.That(ChatTemplate.Detect(folder), Is.SameAs(ChatTemplate.ChatMl));
            return Tokenizer.Load(folder);
        });
        Assert.Multiple(() =>
        {
            Assert.That(tokenizer.VocabularySize, Is.EqualTo(300));
            Assert.That(tokenizer.TokenOf(299), Is.EqualTo("<|reserved_39|>"));
            Assert.That(tokenizer.Encode("xab<|im_end|>"), Is.EqualTo((int[])[0x78, 256, 259]));
        });
    }

    [Test]
    public void LearnMerges_PairsByCountThenIds()
    {
        // "ab" three times, "cd" three times, "xy" twice, and each also inside longer pairs.
        List<(int Left, int Right)> merges = TokenizerWriter.LearnMerges("cd ab xy cd ab xy cd ab", 100);
        Assert.Multiple(() =>
        {
            Assert.That(merges[0], Is.EqualTo(((int)'a', (int)'b')));
            Assert.That(merges[1], Is.EqualTo(((int)' ', 256)), "blank and ab, three times");
            Assert.That(merges[2], Is.EqualTo(((int)'c', (int)'d')));
            Assert.That(merges, Has.Count.EqualTo(6), "and blank-cd, xy, blank-xy; nothing else occurs twice");
            Assert.That(TokenizerWriter.LearnMerges("cd ab xy cd ab xy cd ab", 2), Is.EqualTo(merges[..2]));
        });
    }

    [Test]
    public void LearnMerges_MoreOfThem_ShortenTheText()
    {
        int[] lengths = [.. ((int[])[0, 20, 60, 120]).Select(n => SmallTokenizers.LoadByteLevel(n).Encode(SmallTokenizers.TrainingText).Length)];
        Assert.That(lengths, Is.Ordered.Descending.And.Unique);
    }
}
