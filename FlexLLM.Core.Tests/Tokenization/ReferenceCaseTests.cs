using NUnit.Framework;

namespace FlexLLM.Tests.Tokenization;

/// <summary>The cases of the four real vocabularies: ids given by other implementations.</summary>
[TestFixture]
internal sealed class ReferenceCaseTests
{
    // Cases whose ids do not decode to their text: marks and blanks of SentencePiece, composed characters (NFC).
    private static readonly Dictionary<string, int[]> OneWay = new()
    {
        ["llama-2"] = [33, 34, 35, 37, 38],
        ["qwen2"] = [21, 22, 23, 38],
    };

    [Test]
    public void Encode_ReferenceCases_GiveTheirIds(
        [ValueSource(typeof(Vocabularies), nameof(Vocabularies.Names))] string name,
        [Values("cases.json", "cases_extra.json")] string file)
    {
        Tokenizer tokenizer = Vocabularies.Get(name);
        List<(string Text, int[] Ids)> cases = Vocabularies.Cases(name, file);
        Assert.That(cases, Has.Count.GreaterThanOrEqualTo(40));
        Assert.Multiple(() =>
        {
            for (int i = 0; i < cases.Count; i++)
            {
                Assert.That(tokenizer.Encode(cases[i].Text, addSpecialTokens: false), Is.EqualTo(cases[i].Ids), $"case {i}");
            }
        });
    }

    [Test]
    public void Decode_ReferenceCases_GiveTheirText(
        [ValueSource(typeof(Vocabularies), nameof(Vocabularies.Names))] string name,
        [Values("cases.json", "cases_extra.json")] string file)
    {
        Tokenizer tokenizer = Vocabularies.Get(name);
        int[] oneWay = file == "cases_extra.json" ? OneWay.GetValueOrDefault(name, []) : [];
        List<(string Text, int[] Ids)> cases = Vocabularies.Cases(name, file);
        Assert.Multiple(() =>
        {
            for (int i = 0; i < cases.Count; i++)
            {
                bool same = tokenizer.Decode(cases[i].Ids) == cases[i].Text;
                Assert.That(same, Is.EqualTo(!oneWay.Contains(i)), $"case {i}");
            }
        });
    }

    [TestCase("gpt-2", new int[0])]
    [TestCase("qwen2", new int[0])]
    [TestCase("llama-2", new[] { 1 })]
    [TestCase("llama-3", new[] { 128000 })]
    public void Encode_WithSpecialTokens_PutsTheTemplateAround(string name, int[] prefix)
    {
        Tokenizer tokenizer = Vocabularies.Get(name);
        Assert.Multiple(() =>
        {
            Assert.That(tokenizer.Encode(string.Empty), Is.EqualTo(prefix));
            Assert.That(tokenizer.Encode("some text"), Is.EqualTo((int[])[.. prefix, .. tokenizer.Encode("some text", false)]));
            Assert.That(tokenizer.BosId, Is.EqualTo(prefix.Length > 0 ? prefix[0] : null));
        });
    }

    [TestCase("gpt-2", 50257)]
    [TestCase("llama-2", 32000)]
    [TestCase("llama-3", 128256)]
    [TestCase("qwen2", 151646)]
    public void VocabularySize_RealVocabulary_IsOneMoreThanTheLargestId(string name, int size)
    {
        Tokenizer tokenizer = Vocabularies.Get(name);
        Assert.Multiple(() =>
        {
            Assert.That(tokenizer.VocabularySize, Is.EqualTo(size));
            Assert.That(tokenizer.IdOf(tokenizer.TokenOf(size - 1)), Is.EqualTo(size - 1));
            Assert.That(() => tokenizer.TokenOf(size), Throws.InstanceOf<ArgumentOutOfRangeException>());
            Assert.That(() => tokenizer.Decode([0, size]), Throws.InstanceOf<ArgumentOutOfRangeException>());
            Assert.That(() => tokenizer.Decode([-1]), Throws.InstanceOf<ArgumentOutOfRangeException>());
            Assert.That(tokenizer.IsSpecial(size), Is.False);
        });
    }
}
