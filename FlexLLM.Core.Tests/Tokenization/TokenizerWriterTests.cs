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
        const string Text = "cd ab xy cd ab xy cd ab";
        List<(int Left, int Right)> merges = TokenizerWriter.LearnMerges(Text, 100);
        (int Left, int Right)[] thrice = [(' ', 'a'), ('c', 'd'), (256, 'b')];
        (int Left, int Right)[] twice = [(' ', 'x'), (' ', 257), (259, 'y')];
        Assert.Multiple(() =>
        {
            Assert.That(merges, Is.EqualTo(((int, int)[])[.. thrice, .. twice]));
            Assert.That(TokenizerWriter.LearnMerges(Text, 2), Is.EqualTo(merges[..2]));
        });
    }

    [Test]
    public void LearnMerges_MoreOfThem_ShortenTheText()
    {
        IEnumerable<int> lengths = ((int[])[0, 10, 30, SmallTokenizers.Merges])
            .Select(n => SmallTokenizers.LoadByteLevel(n).Encode(SmallTokenizers.TrainingText).Length);
        Assert.That(lengths, Is.Ordered.Descending.And.Unique);
    }
}
