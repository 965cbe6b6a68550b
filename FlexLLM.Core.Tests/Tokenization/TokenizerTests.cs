using System.Text.Json.Nodes;
using FlexLLM.Primitives;
using FlexLLM.Tokenization;
using NUnit.Framework;

namespace FlexLLM.Tests.Tokenization;

[TestFixture]
internal sealed class TokenizerTests
{
    [Test]
    public void Encode_LearnedMerges_AreThoseOfPlainRepeatedMerging()
    {
        List<(int Left, int Right)> merges = TokenizerWriter.LearnMerges(SmallTokenizers.TrainingText, SmallTokenizers.Merges);
        SeededRandom random = new(3);
        Assert.Multiple(() =>
        {
            for (int i = 0; i < 500; i++)
            {
                string text = RandomWords(ref random);
                Assert.That(
                    SmallTokenizers.ByteLevel.Encode(text), Is.EqualTo(ByPlainMerging(text, merges)), $"round {i}: '{text}'");
            }
        });
    }

    [Test]
    public void Encode_ComparedWithOtherMerges_Differs()
    {
        List<(int Left, int Right)> merges = TokenizerWriter.LearnMerges(SmallTokenizers.TrainingText, SmallTokenizers.Merges);
        (merges[0], merges[1]) = (merges[1], merges[0]);
        string text = SmallTokenizers.TrainingText;
        Assert.That(
            SmallTokenizers.ByteLevel.Encode(text),
            Is.Not.EqualTo(ByPlainMerging(text, merges)),
            "the comparison must be able to fail");
    }

    [TestCase("gpt-2")]
    [TestCase("llama-3")]
    public void Decode_ByteLevelOfRandomText_GivesTheTextBack(string name)
    {
        Tokenizer tokenizer = Vocabularies.Get(name);
        SeededRandom random = new(4);
        for (int i = 0; i < 1000; i++)
        {
            string text = SmallTokenizers.RandomText(ref random, 30);
            Assert.That(tokenizer.Decode(tokenizer.Encode(text, addSpecialTokens: false)), Is.EqualTo(text));
        }
    }

    [Test]
    public void Decode_ComposingTokenizersOfRandomText_GiveItsComposedForm()
    {
        SeededRandom random = new(5);
        for (int i = 0; i < 1000; i++)
        {
            string text = SmallTokenizers.RandomText(ref random, 30);
            int[] ids = SmallTokenizers.ByteLevel.Encode(text);
            Assert.That(SmallTokenizers.ByteLevel.Decode(ids), Is.EqualTo(UnicodeComposition.Compose(text)));
        }
    }

    [Test]
    public void Decode_SentencePieceOfRandomText_GivesTheTextBack()
    {
        SeededRandom random = new(6);
        for (int i = 0; i < 1000; i++)
        {
            string text = SmallTokenizers.RandomText(ref random, 30);
            int[] ids = SmallTokenizers.SentencePiece.Encode(text);
            Assert.That(SmallTokenizers.SentencePiece.Decode(ids, skipSpecialTokens: true), Is.EqualTo(text));
        }
    }

    [Test]
    public void Encode_LoneSurrogates_CountAsReplacementCharacters()
    {
        Assert.Multiple(() =>
        {
            foreach (Tokenizer tokenizer in (Tokenizer[])[SmallTokenizers.ByteLevel, SmallTokenizers.SentencePiece])
            {
                Assert.That(tokenizer.Encode("a\uD800"), Is.EqualTo(tokenizer.Encode("a\uFFFD")));
                Assert.That(
                    tokenizer.Encode("\uDC00 \U0001F600\uD83D"), Is.EqualTo(tokenizer.Encode("\uFFFD \U0001F600\uFFFD")));
            }
        });
    }

    [Test]
    public void Encode_SpecialTokensAsText_NeverGivesThem()
    {
        SeededRandom random = new(7);
        Tokenizer[] tokenizers = [SmallTokenizers.ByteLevel, SmallTokenizers.SentencePiece];
        string[] spellings = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>", "<unk>", " ", "<", ">", "|"];
        for (int i = 0; i < 500; i++)
        {
            string text = string.Concat(Enumerable.Range(0, 6).Select(_ => spellings[random.Next(spellings.Length)]));
            foreach (Tokenizer tokenizer in tokenizers)
            {
                int[] ids = tokenizer.Encode(text, addSpecialTokens: false, parseSpecialTokens: false);
                Assert.That(ids.Where(tokenizer.IsSpecial), Is.Empty, text);
                Assert.That(tokenizer.Decode(ids), Is.EqualTo(text));
            }
        }
    }

    [Test]
    public void Encode_SpecialTokensInText_GivesThem()
    {
        Tokenizer tokenizer = SmallTokenizers.ByteLevel;
        int start = tokenizer.IdOf("<|im_start|>")!.Value;
        int end = tokenizer.IdOf("<|im_end|>")!.Value;
        int[] ids = tokenizer.Encode("<|im_start|>a<|im_end|><|im_en");
        Assert.Multiple(() =>
        {
            Assert.That(ids[..3], Is.EqualTo((int[])[start, 'a', end]));
            Assert.That(ids.Skip(3).Any(tokenizer.IsSpecial), Is.False);
            Assert.That(tokenizer.Decode(ids, skipSpecialTokens: true), Is.EqualTo("a<|im_en"));
            Assert.That(tokenizer.EosId, Is.EqualTo(end));
        });
    }

    // Ids of HuggingFace's library (tokenizers 0.23) for the same file.
    [TestCase("the  <L>  the", "t|he|<L>|\u2581|\u2581the")]
    [TestCase("the  <R>  the", "t|he|\u2581\u2581|<R>|t|he")]
    [TestCase("a<LR>  <LR>b", "a|<LR>|<LR>|b")]
    [TestCase("wrd wrds _wrd wrd", "wrd|\u2581|w|r|d|s|\u2581|_|w|r|d|\u2581|wrd")]
    [TestCase("<L><R>", "<L><R>")]
    public void Encode_AddedTokenFlags_AreFollowed(string text, string pieces)
    {
        JsonObject json = SmallTokenizers.SentencePieceJson();
        json["normalizer"]!["normalizers"]!.AsArray().RemoveAt(0);
        JsonArray added = json["added_tokens"]!.AsArray();
        int id = json["model"]!["vocab"]!.AsObject().Count;
        added.Add(new JsonObject { ["id"] = id++, ["content"] = "<L>", ["lstrip"] = true });
        added.Add(new JsonObject { ["id"] = id++, ["content"] = "<R>", ["rstrip"] = true });
        added.Add(new JsonObject { ["id"] = id++, ["content"] = "<LR>", ["lstrip"] = true, ["rstrip"] = true });
        added.Add(new JsonObject { ["id"] = id++, ["content"] = "wrd", ["single_word"] = true });
        added.Add(new JsonObject { ["id"] = id++, ["content"] = "<L><R>" });
        added.Add(new JsonObject { ["id"] = id, ["content"] = "_" });
        Tokenizer tokenizer = SmallTokenizers.Load(json);
        string got = string.Join('|', tokenizer.Encode(text, addSpecialTokens: false).Select(tokenizer.TokenOf));
        Assert.That(got, Is.EqualTo(pieces));
    }

    [TestCase("first", "a b</s>c", "\u2581|a|\u2581|b|</s>|c")]
    [TestCase("always", "a b</s>c", "\u2581|a|\u2581|b|</s>|\u2581c")]
    [TestCase("never", "a b</s>c", "a|\u2581|b|</s>|c")]
    [TestCase("first", " a", "\u2581|a")]
    public void Encode_Metaspace_PutsMarksInFront(string scheme, string text, string pieces)
    {
        JsonObject json = SmallTokenizers.SentencePieceJson();
        json["normalizer"] = null;
        json["pre_tokenizer"] = JsonNode.Parse(
            $$"""{ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "{{scheme}}", "split": false }""");
        Tokenizer tokenizer = SmallTokenizers.Load(json);
        Assert.That(
            string.Join('|', tokenizer.Encode(text, addSpecialTokens: false).Select(tokenizer.TokenOf)), Is.EqualTo(pieces));
    }

    [TestCase(true, true, 1)]
    [TestCase(true, false, 2)]
    [TestCase(false, true, 0)]
    public void Encode_UnknownCharacters_FollowUnknownTokenAndFusing(bool hasToken, bool fuse, int count)
    {
        JsonObject json = SmallTokenizers.SentencePieceJson();
        json["model"]!["byte_fallback"] = false;
        json["model"]!["fuse_unk"] = fuse;
        json["model"]!["unk_token"] = hasToken ? "<unk>" : null;
        Tokenizer tokenizer = SmallTokenizers.Load(json);
        int[] ids = tokenizer.Encode("a\u00E9\u00E8b", addSpecialTokens: false);
        Assert.That(ids.Skip(2).SkipLast(1), Is.EqualTo(Enumerable.Repeat(0, count)));
    }

    [Test]
    public void Encode_DroppedCharacterBetweenMarks_LetsThemMerge()
    {
        JsonObject json = SmallTokenizers.SentencePieceJson();
        json["model"]!["byte_fallback"] = false;
        json["model"]!["unk_token"] = null;
        Tokenizer tokenizer = SmallTokenizers.Load(json);
        int twoMarks = tokenizer.IdOf("\u2581\u2581")!.Value;
        Assert.That(tokenizer.Encode("\u00E9 ", addSpecialTokens: false), Is.EqualTo((int[])[twoMarks]));
    }

    [TestCase("""{ "add_bos_token": false }""", new int[0])]
    [TestCase("""{ "add_bos_token": true, "bos_token": "<s>" }""", new[] { 1 })]
    [TestCase("""{ "add_eos_token": true, "eos_token": { "content": "</s>" } }""", new[] { 1, 2 })]
    public void Load_ConfigBesideTheFile_DecidesWhatIsPutAround(string config, int[] around)
    {
        Tokenizer tokenizer = SmallTokenizers.Load(SmallTokenizers.SentencePieceJson(), config);
        Assert.That(tokenizer.Encode(string.Empty), Is.EqualTo(around));
    }

    [Test]
    public void Encode_OneVeryLongWord_TakesNoQuadraticTime()
    {
        string word = string.Concat(Enumerable.Repeat("thecatsat", 30_000));
        Assert.Multiple(() =>
        {
            foreach (Tokenizer tokenizer in (Tokenizer[])[SmallTokenizers.ByteLevel, SmallTokenizers.SentencePiece])
            {
                int[] ids = tokenizer.Encode(word);
                Assert.That(ids, Has.Length.LessThan(word.Length));
                Assert.That(tokenizer.Decode(ids, skipSpecialTokens: true), Is.EqualTo(word));
            }
        });
    }

    [Test]
    public void Encode_ManyThreads_GiveWhatOneGives()
    {
        Tokenizer fresh = SmallTokenizers.LoadByteLevel(SmallTokenizers.Merges);
        SeededRandom random = new(8);
        string[] texts = [.. Enumerable.Range(0, 400).Select(_ => RandomWords(ref random))];
        int[][] expected = [.. texts.Select(t => SmallTokenizers.ByteLevel.Encode(t))];
        int[][] got = new int[texts.Length][];
        Parallel.For(0, texts.Length, i => got[i] = fresh.Encode(texts[i]));
        Assert.That(got, Is.EqualTo(expected));
    }

    private static string RandomWords(ref SeededRandom random)
    {
        List<string> parts = [];
        for (int left = random.Next(8); left > 0; left--)
        {
            int start = random.Next(SmallTokenizers.TrainingText.Length - 12);
            parts.Add(SmallTokenizers.TrainingText.Substring(start, random.Next(12)));
            parts.Add(SmallTokenizers.RandomText(ref random, 2));
        }

        return string.Concat(parts);
    }

    /// <summary>The rule itself: as long as there is one, merge the leftmost pair of lowest rank.</summary>
    private static List<int> ByPlainMerging(string text, List<(int Left, int Right)> merges)
    {
        string normal = UnicodeComposition.Compose(text);
        WordPattern pattern = WordPattern.Recognize(
            @"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")!;
        List<int> ids = [];
        for (int start = 0; start < normal.Length;)
        {
            int end = pattern.NextEnd(normal, start);
            List<int> word = [.. System.Text.Encoding.UTF8.GetBytes(normal[start..end]).Select(b => (int)b)];
            start = end;
            while (Best(word, merges) is (int at, int rank) && rank >= 0)
            {
                word[at] = 256 + rank;
                word.RemoveAt(at + 1);
            }

            ids.AddRange(word);
        }

        return ids;
    }

    private static (int At, int Rank) Best(List<int> word, List<(int Left, int Right)> merges)
    {
        (int At, int Rank) best = (-1, -1);
        for (int i = 1; i < word.Count; i++)
        {
            int rank = merges.IndexOf((word[i - 1], word[i]));
            if (rank >= 0 && (best.Rank < 0 || rank < best.Rank))
            {
                best = (i - 1, rank);
            }
        }

        return best;
    }

    /// <summary>A SentencePiece-style tokenizer puts a blank before a text, but not before what goes on from another.</summary>
    [Test]
    public void EncodeContinuation_SentencePiece_AddsNoBlank()
    {
        Tokenizer tokenizer = Tokenizer.Load(SharedData.Require("tokenizers", "llama-2"));
        int[] prompt = tokenizer.Encode("Q:", addSpecialTokens: false);
        Assert.That(tokenizer.Decode([.. prompt, .. tokenizer.EncodeContinuation("Ada")]), Is.EqualTo("Q:Ada"));
        Assert.That(tokenizer.Decode([.. prompt, .. tokenizer.EncodeContinuation(" Ada")]), Is.EqualTo("Q: Ada"));
    }
}
