using System.Text.Json;

namespace FlexLLM.Tokenization;

/// <content>The "model" section: vocabulary and merges of a BPE.</content>
internal sealed partial class TokenizerFile
{
    private BpeModel ReadModel(JsonField model, Dictionary<string, int> vocabulary)
    {
        foreach (string affix in (ReadOnlySpan<string>)["continuing_subword_prefix", "end_of_word_suffix"])
        {
            if (model.Optional(affix)?.Text() is { Length: > 0 })
            {
                throw model.Required(affix).Fault("is not supported unless empty");
            }
        }

        if (model.Optional("dropout") is JsonField dropout
            && !(dropout.Value.ValueKind == JsonValueKind.Number && dropout.Value.GetDouble() == 0))
        {
            throw dropout.Fault("is not supported unless null or 0");
        }

        int? unknown = null;
        if (model.Optional("unk_token") is JsonField token)
        {
            unknown = _vocabulary.TryGetValue(token.Text(), out int id) ? id : throw token.Fault($"no piece is '{token.Text()}'");
        }

        JsonField merges = model.Required("merges");
        merges.Expect(JsonValueKind.Array);
        int[] mergedIds = new int[merges.Value.GetArrayLength()];
        PairRanks ranks = ReadMerges(merges, vocabulary, mergedIds);
        return new BpeModel(new BpeParts
        {
            Vocabulary = vocabulary,
            Ranks = ranks,
            MergedIds = mergedIds,
            ByteLevel = _byteLevel,
            ByteFallback = model.Flag("byte_fallback", false),
            IgnoreMerges = model.Flag("ignore_merges", false),
            UnknownId = unknown,
            FuseUnknown = model.Flag("fuse_unk", false),
        });
    }

    private PairRanks ReadMerges(JsonField merges, Dictionary<string, int> vocabulary, int[] mergedIds)
    {
        // A special token arises from its spelling as an added token or not at all, so that a caller can have it read as text.
        HashSet<int> specials = [.. _addedTokens.Where(t => t.Special).Select(t => t.Id)];
        PairRanks ranks = new(mergedIds.Length);
        int rank = 0;
        foreach (JsonElement merge in merges.Value.EnumerateArray())
        {
            if (!TryReadMerge(merge, out string left, out string right))
            {
                throw merges.Fault($"merge {rank} is neither a pair of pieces nor two pieces with one blank between them");
            }

            if (!vocabulary.TryGetValue(left, out int leftId) || !vocabulary.TryGetValue(right, out int rightId)
                || !vocabulary.TryGetValue(left + right, out mergedIds[rank]))
            {
                throw merges.Fault($"merge {rank}: '{left}', '{right}' or the two together is no piece of the vocabulary");
            }

            if (!specials.Contains(mergedIds[rank]))
            {
                ranks.Set(leftId, rightId, rank);
            }

            rank++;
        }

        return ranks;
    }

    // Not by JsonField: there are hundreds of thousands of merges, and a field keeps its path.
    private static bool TryReadMerge(JsonElement merge, out string left, out string right)
    {
        (left, right) = (string.Empty, string.Empty);
        if (merge.ValueKind == JsonValueKind.Array && merge.GetArrayLength() == 2
            && merge[0].ValueKind == JsonValueKind.String && merge[1].ValueKind == JsonValueKind.String)
        {
            (left, right) = (merge[0].GetString()!, merge[1].GetString()!);
        }
        else if (merge.ValueKind == JsonValueKind.String)
        {
            string text = merge.GetString()!;
            int blank = text.IndexOf(' ', StringComparison.Ordinal);
            if (blank > 0 && blank == text.LastIndexOf(' '))
            {
                (left, right) = (text[..blank], text[(blank + 1)..]);
            }
        }

        return left.Length > 0 && right.Length > 0;
    }
}
