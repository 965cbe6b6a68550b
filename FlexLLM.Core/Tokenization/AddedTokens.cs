using System.Buffers;
using System.Diagnostics;
using System.Globalization;
using System.Text;

namespace FlexLLM.Tokenization;

/// <summary>One entry of added_tokens.</summary>
/// <param name="Id">The token's id.</param>
/// <param name="Content">Its spelling; never empty.</param>
/// <param name="SingleWord">Not recognised where a word character touches it.</param>
/// <param name="LeftStrip">White space before it belongs to it.</param>
/// <param name="RightStrip">White space after it belongs to it.</param>
/// <param name="Normalized">Looked for in normalized text, else in the text as given.</param>
/// <param name="Special">Control tokens: left out of decoded text on request, and plain text on request.</param>
internal sealed record AddedToken(
    int Id, string Content, bool SingleWord, bool LeftStrip, bool RightStrip, bool Normalized, bool Special);

/// <summary>A part of a text: an added token, or text between such (then Token is null). Start and End in UTF-16 units.</summary>
internal readonly record struct TextPart(int Start, int End, AddedToken? Token);

/// <summary>Finds added tokens in text: the leftmost first, of those at one place the longest.</summary>
internal sealed class AddedTokens
{
    private readonly SearchValues<string> _spellings;
    private readonly ILookup<char, AddedToken> _byFirstChar;

    public AddedTokens(IEnumerable<AddedToken> tokens)
    {
        AddedToken[] all = [.. tokens];
        _spellings = SearchValues.Create([.. all.Select(t => t.Content)], StringComparison.Ordinal);
        _byFirstChar = all.OrderByDescending(t => t.Content.Length).ToLookup(t => t.Content[0]);
    }

    /// <summary>Cuts a text into its added tokens and the texts between them, none of them empty.</summary>
    public List<TextPart> Split(string text, bool parseSpecialTokens)
    {
        List<TextPart> parts = [];
        int plain = 0; // Text before this place is in parts.
        int at = 0;
        while (text.AsSpan(at).IndexOfAny(_spellings) is int offset and >= 0)
        {
            int start = at + offset;
            AddedToken token = LongestAt(text, start);
            int end = start + token.Content.Length;
            at = end;
            if ((token.Special && !parseSpecialTokens) || (token.SingleWord && (EndsWord(text, start) || StartsWord(text, end))))
            {
                continue;
            }

            while (token.LeftStrip && start > plain && char.IsWhiteSpace(text[start - 1]))
            {
                start--;
            }

            while (token.RightStrip && end < text.Length && char.IsWhiteSpace(text[end]))
            {
                end++;
            }

            if (start > plain)
            {
                parts.Add(new TextPart(plain, start, null));
            }

            parts.Add(new TextPart(start, end, token));
            plain = Math.Max(plain, end);
        }

        if (plain < text.Length)
        {
            parts.Add(new TextPart(plain, text.Length, null));
        }

        return parts;
    }

    private AddedToken LongestAt(string text, int start)
    {
        ReadOnlySpan<char> rest = text.AsSpan(start);
        foreach (AddedToken token in _byFirstChar[text[start]])
        {
            if (rest.StartsWith(token.Content, StringComparison.Ordinal))
            {
                return token;
            }
        }

        throw new UnreachableException("A spelling was found, yet no token has it.");
    }

    private static bool EndsWord(string text, int end) =>
        Rune.DecodeLastFromUtf16(text.AsSpan(0, end), out Rune rune, out _) == OperationStatus.Done && IsWord(rune);

    private static bool StartsWord(string text, int start) =>
        Rune.DecodeFromUtf16(text.AsSpan(start), out Rune rune, out _) == OperationStatus.Done && IsWord(rune);

    /// <summary>\w: letters, marks, decimal digits, letter numbers, connectors, and the two joiners.</summary>
    private static bool IsWord(Rune rune) => Rune.GetUnicodeCategory(rune) switch
    {
        <= UnicodeCategory.LetterNumber or UnicodeCategory.ConnectorPunctuation => true,
        _ => rune.Value is 0x200C or 0x200D,
    };
}
