using System.Text;
using System.Text.Json;

namespace FlexLLM.Tokenization;

/// <summary>
/// Makes small byte-level tokenizers for tests, samples and random models: ids 0 to 255 are the bytes, then the merged pieces
/// in the order of their merges, then the ChatML special tokens. Splits and normalizes as Qwen2 does.
/// </summary>
internal static class TokenizerWriter
{
    /// <summary>End of a text, start and end of a turn.</summary>
    public static readonly string[] SpecialTokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

    private const string Expression =
        @"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    private const string ChatMlTemplate =
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    /// <summary>Writes tokenizer.json and tokenizer_config.json (with a ChatML template) into an existing folder.</summary>
    /// <param name="folder">The folder.</param>
    /// <param name="merges">Pairs of earlier ids; merge i makes id 256 + i. No two make the same piece.</param>
    /// <param name="vocabularySize">
    /// Where more than bytes, merges and special tokens need: the rest is filled with special tokens &lt;|reserved_N|&gt;.
    /// </param>
    public static void Write(string folder, IReadOnlyList<(int Left, int Right)> merges, int vocabularySize = 0)
    {
        List<string> pieces = [.. Enumerable.Range(0, 256).Select(b => ByteAlphabet.CharOf((byte)b).ToString())];
        List<string> rules = [];
        foreach ((int left, int right) in merges)
        {
            rules.Add($"{pieces[left]} {pieces[right]}");
            pieces.Add(pieces[left] + pieces[right]);
        }

        List<string> specials = [.. SpecialTokens];
        while (pieces.Count + specials.Count < vocabularySize)
        {
            specials.Add($"<|reserved_{specials.Count - SpecialTokens.Length}|>");
        }

        WriteFile(Path.Combine(folder, "tokenizer.json"), json => WriteTokenizer(json, pieces, rules, specials));
        WriteFile(Path.Combine(folder, "tokenizer_config.json"), WriteConfig);
    }

    /// <summary>
    /// Learns merges from a text: each round takes the most frequent pair inside words, the one of smallest ids among equals,
    /// until the count is reached or no pair is left that occurs twice. Time: words times merges.
    /// </summary>
    public static List<(int Left, int Right)> LearnMerges(string text, int count)
    {
        List<(List<int> Symbols, int Times)> words = Words(text);
        HashSet<string> made = [];
        List<string> pieces = [.. Enumerable.Range(0, 256).Select(b => ((char)b).ToString())];
        HashSet<(int Left, int Right)> refused = [];
        List<(int Left, int Right)> merges = [];
        while (merges.Count < count && MostFrequent(words, refused) is (int left, int right))
        {
            // The same piece from other parts would need its id twice.
            if (!made.Add(pieces[left] + pieces[right]))
            {
                refused.Add((left, right));
                continue;
            }

            int id = pieces.Count;
            pieces.Add(pieces[left] + pieces[right]);
            merges.Add((left, right));
            foreach ((List<int> symbols, _) in words)
            {
                Replace(symbols, left, right, id);
            }
        }

        return merges;
    }

    private static void WriteFile(string path, Action<Utf8JsonWriter> write)
    {
        using FileStream stream = File.Create(path);
        using Utf8JsonWriter json = new(stream, new JsonWriterOptions { Indented = true });
        json.WriteStartObject();
        write(json);
        json.WriteEndObject();
    }

    private static void WriteConfig(Utf8JsonWriter json)
    {
        json.WriteBoolean("add_bos_token", false);
        json.WriteNull("bos_token");
        json.WriteString("eos_token", SpecialTokens[2]);
        json.WriteString("pad_token", SpecialTokens[0]);
        json.WriteString("chat_template", ChatMlTemplate);
        json.WriteString("tokenizer_class", "PreTrainedTokenizerFast");
    }

    private static void WriteTokenizer(Utf8JsonWriter json, List<string> pieces, List<string> rules, List<string> specials)
    {
        json.WriteString("version", "1.0");
        json.WriteStartArray("added_tokens");
        for (int i = 0; i < specials.Count; i++)
        {
            json.WriteStartObject();
            json.WriteNumber("id", pieces.Count + i);
            json.WriteString("content", specials[i]);
            foreach (string flag in (ReadOnlySpan<string>)["single_word", "lstrip", "rstrip", "normalized"])
            {
                json.WriteBoolean(flag, false);
            }

            json.WriteBoolean("special", true);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteStartObject("normalizer");
        json.WriteString("type", "NFC");
        json.WriteEndObject();
        json.WriteStartObject("pre_tokenizer");
        json.WriteString("type", "Sequence");
        json.WriteStartArray("pretokenizers");
        json.WriteStartObject();
        json.WriteString("type", "Split");
        json.WriteStartObject("pattern");
        json.WriteString("Regex", Expression);
        json.WriteEndObject();
        json.WriteString("behavior", "Isolated");
        json.WriteBoolean("invert", false);
        json.WriteEndObject();
        WriteByteLevel(json);
        json.WriteEndArray();
        json.WriteEndObject();
        json.WritePropertyName("decoder");
        WriteByteLevel(json);
        json.WriteStartObject("model");
        json.WriteString("type", "BPE");
        json.WriteStartObject("vocab");
        for (int id = 0; id < pieces.Count; id++)
        {
            json.WriteNumber(pieces[id], id);
        }

        json.WriteEndObject();
        json.WriteStartArray("merges");
        foreach (string rule in rules)
        {
            json.WriteStringValue(rule);
        }

        json.WriteEndArray();
        json.WriteEndObject();
    }

    private static void WriteByteLevel(Utf8JsonWriter json)
    {
        json.WriteStartObject();
        json.WriteString("type", "ByteLevel");
        json.WriteBoolean("add_prefix_space", false);
        json.WriteBoolean("trim_offsets", false);
        json.WriteBoolean("use_regex", false);
        json.WriteEndObject();
    }

    /// <summary>The distinct words of a text as bytes, in the order they first occur, with their counts.</summary>
    private static List<(List<int> Symbols, int Times)> Words(string text)
    {
        string normal = UnicodeComposition.Compose(Tokenizer.WellFormed(text));
        WordPattern pattern = WordPattern.Recognize(Expression)!;
        OrderedDictionary<string, int> counts = new(StringComparer.Ordinal);
        for (int start = 0; start < normal.Length;)
        {
            int end = pattern.NextEnd(normal, start);
            string word = normal[start..end];
            counts[word] = counts.GetValueOrDefault(word) + 1;
            start = end;
        }

        return [.. counts.Select(w => (Encoding.UTF8.GetBytes(w.Key).Select(b => (int)b).ToList(), w.Value))];
    }

    private static (int Left, int Right)? MostFrequent(
        List<(List<int> Symbols, int Times)> words, HashSet<(int Left, int Right)> refused)
    {
        Dictionary<(int Left, int Right), int> counts = [];
        foreach ((List<int> symbols, int times) in words)
        {
            for (int i = 1; i < symbols.Count; i++)
            {
                (int Left, int Right) pair = (symbols[i - 1], symbols[i]);
                counts[pair] = counts.GetValueOrDefault(pair) + times;
            }
        }

        (int Left, int Right)? best = null;
        int most = 1;
        foreach (((int Left, int Right) pair, int times) in counts)
        {
            bool better = times > most || (times == most && best is not null && pair.CompareTo(best.Value) < 0);
            if (better && !refused.Contains(pair))
            {
                (best, most) = (pair, times);
            }
        }

        return best;
    }

    private static void Replace(List<int> symbols, int left, int right, int id)
    {
        int count = 0;
        for (int i = 0; i < symbols.Count; i++)
        {
            bool pair = i + 1 < symbols.Count && symbols[i] == left && symbols[i + 1] == right;
            symbols[count++] = pair ? id : symbols[i];
            i += pair ? 1 : 0;
        }

        symbols.RemoveRange(count, symbols.Count - count);
    }
}
