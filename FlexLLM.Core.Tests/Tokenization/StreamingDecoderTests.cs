using System.Globalization;
using System.Text;
using FlexLLM.Primitives;
using FlexLLM.Tokenization;
using NUnit.Framework;

namespace FlexLLM.Tests.Tokenization;

[TestFixture]
internal sealed class StreamingDecoderTests
{
    [Test]
    public void Append_RandomIdsOfRealVocabulary_AddUpToTheWhole(
        [ValueSource(typeof(Vocabularies), nameof(Vocabularies.Names))] string name)
    {
        Tokenizer tokenizer = Vocabularies.Get(name);
        CheckRandomIds(tokenizer, sentencePiece: name == "llama-2");
    }

    [Test]
    public void Append_RandomIdsOfSmallVocabularies_AddUpToTheWhole()
    {
        CheckRandomIds(SmallTokenizers.ByteLevel, sentencePiece: false);
        CheckRandomIds(SmallTokenizers.SentencePiece, sentencePiece: true);
    }

    [Test]
    public void Append_CharacterInFourTokens_ComesWithTheLast()
    {
        StreamingDecoder decoder = new(SmallTokenizers.SentencePiece);
        string[] outputs = [.. Bytes("\U0001F600").Select(decoder.Append)];
        Assert.That(outputs, Is.EqualTo((string[])["", "", "", "\U0001F600"]));
    }

    [Test]
    public void Append_CharacterThatCannotBecomeValid_ComesAsSoonAsThatIsKnown()
    {
        StreamingDecoder decoder = new(SmallTokenizers.SentencePiece);
        int[] ids = [.. Bytes("\U0001F600")[..2], .. Bytes("!")];
        string[] outputs = [.. ids.Select(decoder.Append), decoder.Flush()];
        Assert.That(outputs, Is.EqualTo((string[])["", "", "\uFFFD\uFFFD!", ""]));
    }

    [Test]
    public void Append_LeadingBlank_IsStrippedOnceAndAgainAfterFlush()
    {
        Tokenizer tokenizer = SmallTokenizers.SentencePiece;
        int cat = tokenizer.IdOf("\u2581cat")!.Value;
        StreamingDecoder decoder = new(tokenizer);
        string[] outputs = [decoder.Append(cat), decoder.Append(cat), decoder.Flush(), decoder.Append(cat)];
        Assert.That(outputs, Is.EqualTo((string[])["cat", " cat", "", "cat"]));
    }

    [Test]
    public void Append_UnknownId_ThrowsAndChangesNothing()
    {
        StreamingDecoder decoder = new(SmallTokenizers.SentencePiece);
        int[] bytes = Bytes("\u00E9");
        _ = decoder.Append(bytes[0]);
        Assert.Multiple(() =>
        {
            Assert.That(() => decoder.Append(1_000_000), Throws.InstanceOf<ArgumentOutOfRangeException>());
            Assert.That(decoder.Append(bytes[1]), Is.EqualTo("\u00E9"));
        });
    }

    [Test]
    public void PlainDecode_OtherIds_Differs()
    {
        Tokenizer tokenizer = SmallTokenizers.ByteLevel;
        string plain = Plain(tokenizer, [1, 2], sentencePiece: false);
        Assert.That(plain, Is.Not.EqualTo(tokenizer.Decode([2, 1])), "the reference must tell ids apart");
    }

    private static int[] Bytes(string text) =>
        [.. Encoding.UTF8.GetBytes(text).Select(b => SmallTokenizers.SentencePiece.IdOf($"<0x{b:X2}>")!.Value)];

    private static void CheckRandomIds(Tokenizer tokenizer, bool sentencePiece)
    {
        SeededRandom random = new(9);
        int rounds = 400;
        Assert.Multiple(() =>
        {
            for (int i = 0; i < rounds; i++)
            {
                // Low ids are single bytes in all six vocabularies: half of the ids, so that characters form and break.
                int[] ids = new int[random.Next(24)];
                for (int j = 0; j < ids.Length; j++)
                {
                    ids[j] = random.Next(random.Next(2) == 0 ? 256 : tokenizer.VocabularySize);
                }

                bool skip = i % 2 == 0;
                StreamingDecoder decoder = new(tokenizer, skip);
                List<string> outputs = [.. ids.Select(decoder.Append)];
                Assert.That(outputs.All(IsWhole), $"round {i}: half a surrogate pair");
                outputs.Add(decoder.Flush());
                string whole = tokenizer.Decode(ids, skip);
                Assert.That(string.Concat(outputs), Is.EqualTo(whole), $"round {i}");
                int[] kept = [.. ids.Where(id => !skip || !tokenizer.IsSpecial(id))];
                Assert.That(whole, Is.EqualTo(Plain(tokenizer, kept, sentencePiece)), $"round {i} against the plain decoder");
            }
        });
    }

    private static bool IsWhole(string text) =>
        text.Length == 0 || !(char.IsLowSurrogate(text[0]) || char.IsHighSurrogate(text[^1]));

    /// <summary>Decoding as the file format describes it, over the whole sequence at once.</summary>
    private static string Plain(Tokenizer tokenizer, int[] ids, bool sentencePiece)
    {
        List<byte> bytes = [];
        StringBuilder text = new();
        foreach (string piece in ids.Select(tokenizer.TokenOf))
        {
            if (!sentencePiece)
            {
                bytes.AddRange(ByteAlphabet.BytesOf(piece));
            }
            else if (piece.Length == 6 && piece.StartsWith("<0x", StringComparison.Ordinal))
            {
                bytes.Add(byte.Parse(piece.AsSpan(3, 2), NumberStyles.HexNumber, CultureInfo.InvariantCulture));
            }
            else
            {
                TakeRun();
                text.Append(piece.Replace('\u2581', ' '));
            }
        }

        if (!sentencePiece)
        {
            return Encoding.UTF8.GetString([.. bytes]);
        }

        TakeRun();
        return text.Length > 0 && text[0] == ' ' ? text.ToString(1, text.Length - 1) : text.ToString();

        // Each byte stands alone unless it starts a whole character.
        void TakeRun()
        {
            while (bytes.Count > 0)
            {
                int length = Enumerable.Range(1, Math.Min(4, bytes.Count)).FirstOrDefault(n => IsCharacter(bytes[..n]));
                text.Append(length == 0 ? "\uFFFD" : Encoding.UTF8.GetString([.. bytes[..length]]));
                bytes.RemoveRange(0, Math.Max(length, 1));
            }
        }
    }

    private static bool IsCharacter(List<byte> bytes) => System.Text.Unicode.Utf8.IsValid(bytes.ToArray());
}
