using System.Text;
using System.Text.Unicode;

namespace FlexLLM.Tokenization;

/// <summary>What a decoder section comes to: per piece a rewriting, then bytes to text, then blanks off the front.</summary>
internal sealed record TokenDecoder
{
    /// <summary>Pieces spell bytes in the alphabet of <see cref="ByteAlphabet"/>.</summary>
    public bool ByteLevel { get; init; }

    /// <summary>Pieces &lt;0xHH&gt; stand for bytes. Not together with ByteLevel.</summary>
    public bool ByteFallback { get; init; }

    /// <summary>Texts that are replaced inside each piece, in order.</summary>
    public IReadOnlyList<(string From, string To)> Replacements { get; init; } = [];

    /// <summary>Metaspace's mark, which decodes to a blank; null without.</summary>
    public char? Mark { get; init; }

    /// <summary>Marks of the first piece of a text decode to nothing.</summary>
    public bool DropsFirstMarks { get; init; }

    /// <summary>Character that is taken off the front of the text, up to <see cref="StripMax"/> times.</summary>
    public char StripChar { get; init; }

    public int StripMax { get; init; }

    /// <summary>What one piece decodes to.</summary>
    public DecodedPiece Decode(string piece, bool first)
    {
        string text = piece;
        foreach ((string from, string to) in Replacements)
        {
            text = text.Replace(from, to, StringComparison.Ordinal);
        }

        if (Mark is char mark)
        {
            text = first && DropsFirstMarks
                ? text.Replace(mark.ToString(), string.Empty, StringComparison.Ordinal)
                : text.Replace(mark, ' ');
        }

        if (ByteLevel)
        {
            byte[] bytes = ByteAlphabet.BytesOf(text);
            return Utf8.IsValid(bytes) ? new DecodedPiece(null, Encoding.UTF8.GetString(bytes)) : new DecodedPiece(bytes, null);
        }

        return ByteFallback && IsByte(text)
            ? new DecodedPiece(Convert.FromHexString(text.AsSpan(3, 2)), null)
            : new DecodedPiece(null, text);
    }

    private static bool IsByte(string text) =>
        text is ['<', '0', 'x', char high, char low, '>'] && char.IsAsciiHexDigit(high) && char.IsAsciiHexDigit(low);
}

/// <summary>Text of a piece, or bytes that are text only together with their neighbours'. One of the two is null.</summary>
internal sealed record DecodedPiece(byte[]? Bytes, string? Text);
