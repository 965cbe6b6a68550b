using System.Globalization;
using System.Text;

namespace FlexLLM.Tokenization;

/// <summary>
/// The regular expressions by which published byte-level tokenizers cut text into words, written out by hand: their
/// classes go by code point where .NET's Regex goes by UTF-16 unit, and each cut takes time linear in the word.
/// </summary>
internal sealed class WordPattern
{
    /// <summary>The expression built into the ByteLevel pre-tokenizer.</summary>
    public static readonly WordPattern Gpt2 = new(modern: false, digitsMax: int.MaxValue);

    private const string Gpt2Text = @"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    private const string Gpt2Short = @"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    private const string ModernMiddle = @"|[^\r\n\p{L}\p{N}]?\p{L}+|";
    private const string ModernEnd = @"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    private static readonly string[] ModernStarts =
        ["(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)", "(?i:'[sdmt]|'ll|'ve|'re)"];

    private static readonly (string Text, int Max)[] ModernDigits =
        [(@"\p{N}", 1), (@"\p{N}{1}", 1), (@"\p{N}{1,2}", 2), (@"\p{N}{1,3}", 3), (@"\p{N}+", int.MaxValue)];

    // By UTF-16 unit; surrogates are looked up by code point.
    private static readonly CharKind[] Kinds = BuildKinds();

    // Llama 3 and Qwen: contractions in any case, one leading mark before letters, line ends kept together.
    private readonly bool _modern;
    private readonly int _digitsMax;

    private WordPattern(bool modern, int digitsMax)
    {
        _modern = modern;
        _digitsMax = digitsMax;
    }

    private enum CharKind : byte
    {
        Other,
        Letter,
        Number,
        Space,
    }

    /// <summary>The cutter that does what the expression says, or null for an expression that is not known.</summary>
    public static WordPattern? Recognize(string expression)
    {
        if (expression is Gpt2Text or Gpt2Short)
        {
            return Gpt2;
        }

        foreach (string start in ModernStarts)
        {
            foreach ((string digits, int max) in ModernDigits)
            {
                if (expression == start + ModernMiddle + digits + ModernEnd)
                {
                    return new WordPattern(modern: true, max);
                }
            }
        }

        return null;
    }

    /// <summary>True for a character of \p{N}: decimal digits, letter numbers and other numbers.</summary>
    public static bool IsNumber(ReadOnlySpan<char> text, int at, out int units) => KindAt(text, at, out units) == CharKind.Number;

    /// <summary>End of the word that starts at <paramref name="start"/>, before the end of a well-formed text.</summary>
    public int NextEnd(ReadOnlySpan<char> text, int start)
    {
        int contraction = text[start] == '\'' ? Contraction(text, start + 1) : 0;
        if (contraction > 0)
        {
            return start + 1 + contraction;
        }

        CharKind kind = KindAt(text, start, out int units);
        int second = start + units;
        CharKind secondKind = second < text.Length ? KindAt(text, second, out _) : CharKind.Space;
        bool leads = _modern ? kind is CharKind.Other or CharKind.Space && text[start] is not ('\r' or '\n') : text[start] == ' ';
        if (kind == CharKind.Letter || (leads && secondKind == CharKind.Letter))
        {
            return RunEnd(text, second, CharKind.Letter, int.MaxValue);
        }

        if (kind == CharKind.Number)
        {
            return RunEnd(text, second, CharKind.Number, _digitsMax - 1);
        }

        if (!_modern && leads && secondKind == CharKind.Number)
        {
            return RunEnd(text, second, CharKind.Number, int.MaxValue);
        }

        if (kind == CharKind.Other || (text[start] == ' ' && secondKind == CharKind.Other))
        {
            int end = RunEnd(text, second, CharKind.Other, int.MaxValue);
            while (_modern && end < text.Length && text[end] is '\r' or '\n')
            {
                end++;
            }

            return end;
        }

        return SpaceEnd(text, start);
    }

    private int SpaceEnd(ReadOnlySpan<char> text, int start)
    {
        int end = RunEnd(text, start, CharKind.Space, int.MaxValue);
        int lineEnd = _modern ? text[start..end].LastIndexOfAny('\r', '\n') : -1;
        if (lineEnd >= 0)
        {
            return start + lineEnd + 1;
        }

        // \s+(?!\S): a run before a word leaves its last character to that word.
        return end == text.Length || end == start + 1 ? end : end - 1;
    }

    /// <summary>Units of s, t, m, d, re, ve or ll at this place, else 0.</summary>
    private int Contraction(ReadOnlySpan<char> text, int at)
    {
        char first = at < text.Length ? Fold(text[at]) : '\0';
        if (first is 's' or 't' or 'm' or 'd')
        {
            return 1;
        }

        char second = at + 1 < text.Length ? Fold(text[at + 1]) : '\0';
        return (first, second) is ('r', 'e') or ('v', 'e') or ('l', 'l') ? 2 : 0;
    }

    // U+017F, the long s, folds to s too.
    private char Fold(char c) => !_modern ? c : c == '\u017F' ? 's' : char.IsAsciiLetterUpper(c) ? (char)(c | 0x20) : c;

    private static int RunEnd(ReadOnlySpan<char> text, int at, CharKind kind, int max)
    {
        for (; max > 0 && at < text.Length && KindAt(text, at, out int units) == kind; max--)
        {
            at += units;
        }

        return at;
    }

    private static CharKind KindAt(ReadOnlySpan<char> text, int at, out int units)
    {
        char c = text[at];
        units = 1;
        if (!char.IsHighSurrogate(c))
        {
            return Kinds[c];
        }

        units = 2;
        return KindOf(Rune.GetUnicodeCategory(new Rune(c, text[at + 1])));
    }

    private static CharKind KindOf(UnicodeCategory category) => category switch
    {
        <= UnicodeCategory.OtherLetter => CharKind.Letter,
        UnicodeCategory.DecimalDigitNumber or UnicodeCategory.LetterNumber or UnicodeCategory.OtherNumber => CharKind.Number,
        _ => CharKind.Other,
    };

    private static CharKind[] BuildKinds()
    {
        CharKind[] kinds = new CharKind[char.MaxValue + 1];
        for (int c = 0; c < kinds.Length; c++)
        {
            kinds[c] = char.IsWhiteSpace((char)c) ? CharKind.Space : KindOf(char.GetUnicodeCategory((char)c));
        }

        return kinds;
    }
}
