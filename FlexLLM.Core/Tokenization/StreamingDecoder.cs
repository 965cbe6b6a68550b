using System.Buffers;
using System.Text;
using System.Text.Unicode;

namespace FlexLLM.Tokenization;

/// <summary>
/// Decodes one sequence token by token. Each call gives the text that no later token can change: never half a character.
/// All outputs in a row are what <see cref="Tokenizer.Decode"/> gives for all ids.
/// </summary>
internal sealed class StreamingDecoder(Tokenizer tokenizer, bool skipSpecialTokens = false)
{
    private const string Replacement = "\uFFFD";

    private readonly StringBuilder _text = new();
    private byte[] _bytes = new byte[64];
    private int _pending; // Bytes at the start of _bytes that are the beginning of a character.
    private bool _first = true;
    private int _stripLeft = tokenizer.Decoder.StripMax;

    /// <summary>Takes the next token and gives the text that became final, possibly none.</summary>
    /// <exception cref="ArgumentOutOfRangeException">No token has this id; the decoder is as before.</exception>
    public string Append(int id)
    {
        AppendTo(_text, id);
        return Take();
    }

    /// <summary>Ends the sequence: gives U+FFFD for what was left unfinished, and is then ready for another sequence.</summary>
    public string Flush()
    {
        FlushTo(_text);
        return Take();
    }

    internal void AppendTo(StringBuilder output, int id)
    {
        DecodedPiece piece = tokenizer.DecodedPieceOf(id, _first);
        if (skipSpecialTokens && tokenizer.IsSpecial(id))
        {
            return;
        }

        _first = false;
        if (piece.Bytes is not null)
        {
            AppendBytes(output, piece.Bytes);
        }
        else
        {
            AppendPending(output);
            AppendStripped(output, piece.Text);
        }
    }

    internal void FlushTo(StringBuilder output)
    {
        AppendPending(output);
        _first = true;
        _stripLeft = tokenizer.Decoder.StripMax;
    }

    private string Take()
    {
        string text = _text.ToString();
        _text.Clear();
        return text;
    }

    private void AppendBytes(StringBuilder output, byte[] bytes)
    {
        int count = _pending + bytes.Length;
        if (count > _bytes.Length)
        {
            Array.Resize(ref _bytes, count);
        }

        bytes.CopyTo(_bytes, _pending);
        int used = tokenizer.Decoder.ByteLevel ? AppendRuns(output, count) : AppendRunes(output, count);
        _pending = count - used;
        _bytes.AsSpan(used, _pending).CopyTo(_bytes);
    }

    /// <summary>Byte level: U+FFFD for each longest beginning of a character that did not become one.</summary>
    private int AppendRuns(StringBuilder output, int count)
    {
        char[] units = ArrayPool<char>.Shared.Rent(count);
        Utf8.ToUtf16(_bytes.AsSpan(0, count), units, out int used, out int written, isFinalBlock: false);
        AppendStripped(output, units.AsSpan(0, written));
        ArrayPool<char>.Shared.Return(units);
        return used;
    }

    /// <summary>Byte fallback: U+FFFD for each byte that is not part of a character.</summary>
    private int AppendRunes(StringBuilder output, int count)
    {
        Span<char> units = stackalloc char[2];
        int used = 0;
        while (used < count)
        {
            OperationStatus status = Rune.DecodeFromUtf8(_bytes.AsSpan(used, count - used), out Rune rune, out int bytes);
            if (status == OperationStatus.NeedMoreData)
            {
                break;
            }

            AppendStripped(output, status == OperationStatus.Done ? units[..rune.EncodeToUtf16(units)] : Replacement);
            used += status == OperationStatus.Done ? bytes : 1;
        }

        return used;
    }

    private void AppendPending(StringBuilder output)
    {
        // Pending bytes begin one character: to byte level one fault, to byte fallback one for each byte.
        int faults = tokenizer.Decoder.ByteLevel ? Math.Min(_pending, 1) : _pending;
        for (; faults > 0; faults--)
        {
            AppendStripped(output, Replacement);
        }

        _pending = 0;
    }

    private void AppendStripped(StringBuilder output, ReadOnlySpan<char> text)
    {
        while (_stripLeft > 0 && text.Length > 0)
        {
            _stripLeft--;
            if (text[0] != tokenizer.Decoder.StripChar)
            {
                _stripLeft = 0;
                break;
            }

            text = text[1..];
        }

        output.Append(text);
    }
}
