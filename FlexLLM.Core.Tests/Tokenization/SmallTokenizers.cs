using System.Text;
using System.Text.Json.Nodes;
using FlexLLM.Primitives;
using FlexLLM.Tokenization;

namespace FlexLLM.Tests.Tokenization;

/// <summary>Small tokenizers of both kinds that need no data beside the repository, and random texts to feed them.</summary>
internal static class SmallTokenizers
{
    /// <summary>As many merges as the text has pairs that occur twice, nearly.</summary>
    public const int Merges = 40;

    public const string TrainingText =
        "The cat sat on the mat; the other cat didn't. \"That's the 2nd cat that sat there,\" they said.\n\n"
        + "Там, где сидит кот, там сидит и другой кот. 猫が座った、猫が座った。 caf\u00E9 na\u00EFve caf\u00E9\n\tif (cat) { sit(); }\n";

    private static readonly Lazy<Tokenizer> LazyByteLevel = new(() => LoadByteLevel(Merges));
    private static readonly Lazy<Tokenizer> LazySentencePiece = new(() => Load(SentencePieceJson()));

    /// <summary>Splits and normalizes as Qwen2; merges learned from <see cref="TrainingText"/>.</summary>
    public static Tokenizer ByteLevel => LazyByteLevel.Value;

    /// <summary>As Llama 2: Prepend and Replace, byte fallback, one leading blank stripped when decoding.</summary>
    public static Tokenizer SentencePiece => LazySentencePiece.Value;

    public static Tokenizer LoadByteLevel(int merges) =>
        InFolder(folder =>
        {
            TokenizerWriter.Write(folder, TokenizerWriter.LearnMerges(TrainingText, merges));
            return Tokenizer.Load(folder);
        });

    public static Tokenizer Load(JsonNode tokenizer, string? config = null) => Load(tokenizer.ToJsonString(), config);

    public static Tokenizer Load(string tokenizer, string? config = null) => Load(Encoding.UTF8.GetBytes(tokenizer), config);

    public static Tokenizer Load(byte[] tokenizer, string? config = null) =>
        InFolder(folder =>
        {
            File.WriteAllBytes(Path.Combine(folder, "tokenizer.json"), tokenizer);
            if (config is not null)
            {
                File.WriteAllText(Path.Combine(folder, "tokenizer_config.json"), config);
            }

            return Tokenizer.Load(folder);
        });

    public static T InFolder<T>(Func<string, T> use)
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("tokenizer-test-");
        try
        {
            return use(folder.FullName);
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    public static JsonObject SentencePieceJson()
    {
        JsonObject vocabulary = new() { ["<unk>"] = 0, ["<s>"] = 1, ["</s>"] = 2 };
        for (int b = 0; b < 256; b++)
        {
            vocabulary[$"<0x{b:X2}>"] = vocabulary.Count;
        }

        foreach (char c in "\u2581abcdefghijklmnopqrstuvwxyz<>/[]IMSTNY.")
        {
            vocabulary[c.ToString()] = vocabulary.Count;
        }

        JsonArray merges = [];
        foreach ((string left, string right) in ((string, string)[])[
            ("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "\u2581"), ("\u2581\u2581", "\u2581\u2581"), ("a", "t"),
            ("\u2581", "c"), ("\u2581c", "at"), ("s", ">"), ("<", "s>"), ("o", "n")])
        {
            merges.Add($"{left} {right}");
            if (!vocabulary.ContainsKey(left + right))
            {
                vocabulary[left + right] = vocabulary.Count;
            }
        }

        JsonObject tokenizer = JsonNode.Parse("""
            {
              "added_tokens": [
                { "id": 0, "content": "<unk>", "special": true },
                { "id": 1, "content": "<s>", "special": true },
                { "id": 2, "content": "</s>", "special": true }
              ],
              "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "Prepend", "prepend": "▁" },
                { "type": "Replace", "pattern": { "String": " " }, "content": "▁" } ] },
              "pre_tokenizer": null,
              "post_processor": {
                "type": "TemplateProcessing",
                "single": [ { "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } } ],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } }
              },
              "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "ByteFallback" },
                { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] }
            }
            """)!.AsObject();
        tokenizer["model"] = new JsonObject
        {
            ["type"] = "BPE",
            ["unk_token"] = "<unk>",
            ["fuse_unk"] = true,
            ["byte_fallback"] = true,
            ["vocab"] = vocabulary,
            ["merges"] = merges,
        };
        return tokenizer;
    }

    /// <summary>Up to <paramref name="runesMax"/> code points of all kinds of scripts, marks, blanks and controls.</summary>
    public static string RandomText(ref SeededRandom random, int runesMax)
    {
        StringBuilder text = new();
        for (int left = random.Next(runesMax + 1); left > 0; left--)
        {
            (int first, int last) = Ranges[random.Next(Ranges.Length)];
            text.Append(new Rune(random.Next(first, last + 1)));
        }

        return text.ToString();
    }

    private static readonly (int First, int Last)[] Ranges =
    [
        (0x20, 0x7E), (0x61, 0x7A), (0x61, 0x74), (0x20, 0x20), (0x27, 0x27), (0x30, 0x39), (0x09, 0x0D), (0x00, 0x1F),
        (0x80, 0xFF), (0x100, 0x24F), (0x300, 0x36F), (0x5D0, 0x6FF), (0x900, 0x97F), (0x1100, 0x11FF), (0x1E00, 0x1FFF),
        (0x2000, 0x206F), (0x2150, 0x218B), (0x3041, 0x30FF), (0xAC00, 0xAC80), (0xF900, 0xFA00), (0xFFF0, 0xFFFF),
        (0x10400, 0x1044F), (0x1D7CE, 0x1D7FF), (0x1F300, 0x1F64F), (0x20000, 0x20100), (0x10FFF0, 0x10FFFF),
    ];
}
