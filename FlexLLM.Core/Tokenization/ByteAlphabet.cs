using System.Text;

namespace FlexLLM.Tokenization;

/// <summary>
/// The 256 printable characters by which byte-level vocabularies spell bytes: printable Latin-1 stands for itself, the other
/// 68 bytes are U+0100 and up in their order.
/// </summary>
internal static class ByteAlphabet
{
    private static readonly char[] Chars = Build();
    private static readonly Dictionary<char, byte> Bytes = Chars.Select((c, b) => (c, b)).ToDictionary(p => p.c, p => (byte)p.b);

    public static char CharOf(byte value) => Chars[value];

    /// <summary>The bytes that a piece spells; its own UTF-8 where it has a character outside the alphabet.</summary>
    public static byte[] BytesOf(string piece)
    {
        byte[] bytes = new byte[piece.Length];
        for (int i = 0; i < bytes.Length; i++)
        {
            if (!Bytes.TryGetValue(piece[i], out bytes[i]))
            {
                return Encoding.UTF8.GetBytes(piece);
            }
        }

        return bytes;
    }

    private static char[] Build()
    {
        char[] chars = new char[256];
        char next = '\u0100';
        for (int b = 0; b < chars.Length; b++)
        {
            chars[b] = b is (>= 0x21 and <= 0x7E) or (>= 0xA1 and <= 0xAC) or >= 0xAE ? (char)b : next++;
        }

        return chars;
    }
}
