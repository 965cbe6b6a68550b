using System.Text;
using System.Text.Json.Nodes;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Tokenization;

[TestFixture]
internal sealed class TokenizerFileTests
{
    private static readonly (string Field, Action<JsonObject> Break)[] Faults =
    [
        ("model", j => j.Remove("model")),
        ("model.vocab", j => j["model"]!.AsObject().Remove("vocab")),
        ("model.vocab", j => j["model"]!["vocab"] = new JsonObject()),
        ("model.vocab", j => j["model"]!["vocab"]!["a"] = -1),
        ("model.vocab", j => j["model"]!["vocab"]!["a"] = 1.5),
        ("model.vocab", j => j["model"]!["vocab"]!["a"] = "1"),
        ("model.vocab", j => j["model"]!["vocab"]!["a"] = 300),
        ("model.vocab", j => j["model"]!["vocab"]!["a"] = 2_000_000_000),
        ("model.merges", j => j["model"]!["merges"]![0] = "a zz"),
        ("model.merges", j => j["model"]!["merges"]![0] = "a  t"),
        ("model.merges", j => j["model"]!["merges"]![0] = "at"),
        ("model.merges", j => j["model"]!["merges"]![0] = new JsonArray("a")),
        ("model.merges", j => j["model"]!.AsObject().Remove("merges")),
        ("model.type", j => j["model"]!["type"] = "Unigram"),
        ("model.unk_token", j => j["model"]!["unk_token"] = "<none>"),
        ("model.dropout", j => j["model"]!["dropout"] = 0.1),
        ("model.end_of_word_suffix", j => j["model"]!["end_of_word_suffix"] = "</w>"),
        ("model.fuse_unk", j => j["model"]!["fuse_unk"] = 1),
        ("added_tokens[1]", j => j["added_tokens"]![1]!["id"] = 5),
        ("added_tokens[1].id", j => j["added_tokens"]![1]!["id"] = -5),
        ("added_tokens[1].content", j => j["added_tokens"]![1]!.AsObject().Remove("content")),
        ("added_tokens[3]", j => j["added_tokens"]!.AsArray().Add(new JsonObject { ["id"] = 1, ["content"] = "<s>" })),
        ("model.vocab", j => j["added_tokens"]!.AsArray().Add(new JsonObject { ["id"] = 7, ["content"] = "new" })),
        ("normalizer.normalizers[0].type", j => j["normalizer"]!["normalizers"]![0]!["type"] = "NFKC"),
        ("normalizer.normalizers[1].pattern",
            j => j["normalizer"]!["normalizers"]![1]!["pattern"] = new JsonObject { ["Regex"] = "x" }),
        ("pre_tokenizer.type", j => j["pre_tokenizer"] = new JsonObject { ["type"] = "BertPreTokenizer" }),
        ("pre_tokenizer.pattern", j => j["pre_tokenizer"] = JsonNode.Parse(
            """{ "type": "Split", "pattern": { "Regex": "\\w+" }, "behavior": "Isolated" }""")),
        ("pre_tokenizer", j => j["pre_tokenizer"] = JsonNode.Parse(
            """{ "type": "Split", "pattern": { "Regex": "\\w+" }, "behavior": "MergedWithNext" }""")),
        ("decoder", j => j["pre_tokenizer"] = new JsonObject { ["type"] = "ByteLevel" }),
        ("decoder", j => j.Remove("decoder")),
        ("decoder.decoders[0].type", j => j["decoder"]!["decoders"]![0]!["type"] = "WordPiece"),
        ("decoder.decoders[3]", j => j["decoder"]!["decoders"]![3]!["stop"] = 1),
        ("decoder.decoders[2]", j => j["decoder"]!["decoders"]!.AsArray().RemoveAt(2)),
        ("post_processor.type", j => j["post_processor"]!["type"] = "BertProcessing"),
        ("post_processor.special_tokens.<s>", j => j["post_processor"]!["special_tokens"] = new JsonObject()),
        ("post_processor.special_tokens.<s>.ids[0]", j => j["post_processor"]!["special_tokens"]!["<s>"]!["ids"]![0] = 99_999),
        ("post_processor.single", j => j["post_processor"]!["single"]!.AsArray().RemoveAt(1)),
    ];

    [Test]
    public void Load_MalformedFile_NamesFileAndField([Range(0, 36)] int fault)
    {
        JsonObject json = SmallTokenizers.SentencePieceJson();
        Faults[fault].Break(json);
        InvalidFileException error = Assert.Throws<InvalidFileException>(() => SmallTokenizers.Load(json))!;
        Assert.Multiple(() =>
        {
            Assert.That(Faults, Has.Length.EqualTo(37));
            Assert.That(error.Field, Is.EqualTo(Faults[fault].Field));
            Assert.That(Path.GetFileName(error.File), Is.EqualTo("tokenizer.json"));
        });
    }

    [TestCase("")]
    [TestCase("{")]
    [TestCase("[]")]
    [TestCase("null")]
    [TestCase("""{ "model": { "vocab": { "a": 0, "a": 1 }, "merges": [] }, "decoder": { "type": "Fuse" } }""")]
    [TestCase("""{ "model": { "vocab": { "\ud800": 0 }, "merges": [] }, "decoder": { "type": "Fuse" } }""")]
    public void Load_NotATokenizer_ThrowsInvalidFile(string json)
    {
        Assert.That(() => SmallTokenizers.Load(json), Throws.InstanceOf<InvalidFileException>());
    }

    [Test]
    public void Load_SmallestFile_Loads()
    {
        Tokenizer tokenizer = SmallTokenizers.Load(
            """{ "model": { "vocab": { "a": 0, "b": 7 }, "merges": [] }, "decoder": { "type": "Fuse" } }""");
        Assert.Multiple(() =>
        {
            Assert.That(tokenizer.Encode("ab?"), Is.EqualTo((int[])[0, 7]));
            Assert.That(tokenizer.VocabularySize, Is.EqualTo(8));
            Assert.That(() => tokenizer.Decode([3]), Throws.InstanceOf<ArgumentOutOfRangeException>());
            Assert.That((tokenizer.BosId, tokenizer.EosId), Is.EqualTo(((int?)null, (int?)null)));
        });
    }

    [TestCase("""{ "eos_token": "<none>" }""")]
    [TestCase("""{ "eos_token": 5 }""")]
    [TestCase("""{ "bos_token": "<s>", "add_bos_token": "yes" }""")]
    [TestCase("""[]""")]
    public void Load_MalformedConfigBesideIt_NamesThatFile(string config)
    {
        InvalidFileException error =
            Assert.Throws<InvalidFileException>(() => SmallTokenizers.Load(SmallTokenizers.SentencePieceJson(), config))!;
        Assert.That(Path.GetFileName(error.File), Is.EqualTo("tokenizer_config.json"));
    }

    [Test]
    public void Load_NoFile_ThrowsFileNotFound()
    {
        string absent = Path.Combine(Path.GetTempPath(), "none", "tokenizer.json");
        Assert.That(() => Tokenizer.Load(absent), Throws.InstanceOf<InvalidFileException>());
    }

    [Test]
    public void Load_MutatedFile_LoadsOrThrowsInvalidFile()
    {
        byte[] original = Encoding.UTF8.GetBytes(SmallTokenizers.SentencePieceJson().ToJsonString());
        SmallTokenizers.InFolder(folder =>
        {
            string file = Path.Combine(folder, "tokenizer.json");
            (int loaded, int refused) = Fuzz(original, 2000, bytes =>
            {
                File.WriteAllBytes(file, bytes);
                Tokenizer tokenizer = Tokenizer.Load(file);
                _ = tokenizer.Decode(tokenizer.Encode("the cat <s> \u00E9"));
            });
            Assert.That((loaded > 100, refused > 500), Is.EqualTo((true, true)), $"{loaded} loaded, {refused} refused");
            return 0;
        });
    }

    [Test]
    public void Fuzz_LoaderWithAnotherException_Fails()
    {
        Assert.That(() => Fuzz([1, 2, 3], 50, _ => throw new KeyNotFoundException()), Throws.InstanceOf<KeyNotFoundException>());
    }

    private static (int Loaded, int Refused) Fuzz(byte[] original, int rounds, Action<byte[]> load)
    {
        SeededRandom random = new(10);
        int loaded = 0;
        int refused = 0;
        for (int i = 0; i < rounds; i++)
        {
            try
            {
                load(Mutated(original, ref random));
                loaded++;
            }
            catch (InvalidFileException)
            {
                refused++;
            }
        }

        return (loaded, refused);
    }

    private static byte[] Mutated(byte[] original, ref SeededRandom random)
    {
        string[] snippets =
            ["null", "-1", "[]", "{}", "\"\"", "true", "1e999", "4294967296", "\"\\ud800\"", "\"type\"", "\"Sequence\""];
        List<byte> bytes = [.. original];
        for (int edits = random.Next(1, 4); edits > 0 && bytes.Count > 0; edits--)
        {
            int at = random.Next(bytes.Count);
            int length = Math.Min(random.Next(1, 8), bytes.Count - at);
            switch (random.Next(6))
            {
                case 0:
                    bytes[at] = (byte)random.Next(256);
                    break;
                case 1:
                    bytes.RemoveRange(at, length);
                    break;
                case 2:
                    bytes.InsertRange(at, bytes.GetRange(at, length));
                    break;
                case 3:
                    ReplaceValue(bytes, at, snippets[random.Next(snippets.Length)]);
                    break;
                case 4:
                    ReplaceValue(bytes, random.Next(Math.Min(1000, bytes.Count)), snippets[random.Next(snippets.Length)]);
                    break;
                default:
                    bytes[at] = (byte)(bytes[at] ^ 1);
                    break;
            }
        }

        return [.. bytes];
    }

    /// <summary>Puts another value after the next colon: most such files are still JSON.</summary>
    private static void ReplaceValue(List<byte> bytes, int at, string value)
    {
        int colon = bytes.IndexOf((byte)':', at);
        int end = colon < 0 ? -1 : bytes.FindIndex(colon, b => b is (byte)',' or (byte)'}' or (byte)']');
        if (end > 0)
        {
            bytes.RemoveRange(colon + 1, end - colon - 1);
            bytes.InsertRange(colon + 1, Encoding.UTF8.GetBytes(value));
        }
    }
}
