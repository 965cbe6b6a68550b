using System.Collections.Concurrent;
using System.Text.Json;

namespace FlexLLM.Tests.Tokenization;

/// <summary>The four real vocabularies of the reference data, each loaded once, and their cases.</summary>
internal static class Vocabularies
{
    private static readonly ConcurrentDictionary<string, Lazy<Tokenizer>> Loaded = new();

    public static readonly string[] Names = ["gpt-2", "llama-2", "llama-3", "qwen2"];

    public static Tokenizer Get(string name)
    {
        string folder = SharedData.Require("tokenizers", name);
        return Loaded.GetOrAdd(name, _ => new Lazy<Tokenizer>(() => Tokenizer.Load(folder))).Value;
    }

    public static List<(string Text, int[] Ids)> Cases(string name, string file)
    {
        using JsonDocument document = JsonDocument.Parse(File.ReadAllBytes(SharedData.Require("tokenizers", name, file)));
        List<(string Text, int[] Ids)> cases = [];
        foreach (JsonElement item in document.RootElement.EnumerateArray())
        {
            int[] ids = [.. item.GetProperty("ids").EnumerateArray().Select(i => i.GetInt32())];
            cases.Add((item.GetProperty("text").GetString()!, ids));
        }

        return cases;
    }
}
