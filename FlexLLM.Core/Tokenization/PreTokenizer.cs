namespace FlexLLM.Tokenization;

/// <summary>Where a text that is about to be encoded stands.</summary>
internal enum TextPlace
{
    /// <summary>At the very start of what the caller gave.</summary>
    Start,

    /// <summary>After an added token or an earlier cut.</summary>
    Inside,

    /// <summary>It goes on from text that was encoded before it: nothing is put in front.</summary>
    Continued,
}

/// <summary>One step of cutting normalized text into words.</summary>
internal abstract class PreTokenizer
{
    /// <summary>The text that the step cuts; by default the given one.</summary>
    public virtual ReadOnlySpan<char> Rewrite(ReadOnlySpan<char> text, TextPlace place) => text;

    /// <summary>End of the word that starts at <paramref name="start"/>, which is before the end.</summary>
    public abstract int NextEnd(ReadOnlySpan<char> text, int start);
}

/// <summary>Split, or ByteLevel's own expression: cuts by a known regular expression.</summary>
internal sealed class PatternSplit(WordPattern pattern) : PreTokenizer
{
    public override int NextEnd(ReadOnlySpan<char> text, int start) => pattern.NextEnd(text, start);
}

/// <summary>Digits: numbers are words of their own, one by one or a run at a time.</summary>
internal sealed class DigitSplit(bool individual) : PreTokenizer
{
    public override int NextEnd(ReadOnlySpan<char> text, int start)
    {
        bool number = WordPattern.IsNumber(text, start, out int units);
        int end = start + units;
        while (end < text.Length && !(number && individual) && WordPattern.IsNumber(text, end, out units) == number)
        {
            end += units;
        }

        return end;
    }
}

/// <summary>ByteLevel's add_prefix_space: a text starts with a blank.</summary>
internal sealed class BlankPrefix : PreTokenizer
{
    public override ReadOnlySpan<char> Rewrite(ReadOnlySpan<char> text, TextPlace place) =>
        place == TextPlace.Continued || text[0] == ' ' ? text : string.Concat(" ", text);

    public override int NextEnd(ReadOnlySpan<char> text, int start) => text.Length;
}

/// <summary>Metaspace: blanks become a visible mark, which is also put in front, and words may be cut before each mark.</summary>
internal sealed class Metaspace(char mark, Metaspace.Prepend scheme, bool split) : PreTokenizer
{
    internal enum Prepend
    {
        First,
        Always,
        Never,
    }

    public override ReadOnlySpan<char> Rewrite(ReadOnlySpan<char> text, TextPlace place)
    {
        string marked = text.ToString().Replace(' ', mark);
        bool prefix = scheme switch
        {
            Prepend.First => place == TextPlace.Start,
            Prepend.Always => place != TextPlace.Continued,
            _ => false,
        };
        return prefix && marked[0] != mark ? mark + marked : marked;
    }

    public override int NextEnd(ReadOnlySpan<char> text, int start)
    {
        int next = split ? text[(start + 1)..].IndexOf(mark) : -1;
        return next < 0 ? text.Length : start + 1 + next;
    }
}
