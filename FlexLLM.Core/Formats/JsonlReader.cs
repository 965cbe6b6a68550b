using System.Text.Json;

namespace FlexLLM.Formats;

/// <summary>One value of a JSONL file; the element owns its memory.</summary>
/// <param name="Number">Number of the line in the file, counted from 1, blank lines included.</param>
/// <param name="Value">The JSON value on it.</param>
internal readonly record struct JsonlLine(int Number, JsonElement Value);

/// <summary>
/// Reads a JSONL file one line at a time: strict UTF-8, an optional byte order mark, LF or CRLF, blank lines skipped. Holds one
/// line in memory, and refuses lines beyond a limit.
/// </summary>
internal sealed class JsonlReader(Stream stream, string file, int lineBytesMax = JsonlReader.LineBytesMaxDefault) : IDisposable
{
    public const int LineBytesMaxDefault = 16 << 20;

    private byte[] _buffer = FirstBuffer(lineBytesMax);
    private int _begin; // Unread bytes lie at [_begin, _end) of the buffer.
    private int _end;
    private int _line;

    /// <summary>Opens a file.</summary>
    /// <param name="path">The file.</param>
    /// <param name="lineBytesMax">Most bytes on one line, its line feed not counted; at most 2^30.</param>
    /// <exception cref="InvalidFileException">The file does not exist.</exception>
    public static JsonlReader Open(string path, int lineBytesMax = LineBytesMaxDefault) => File.Exists(path)
        ? new JsonlReader(new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, 1), path, lineBytesMax)
        : throw new InvalidFileException(path, "file", "does not exist");

    /// <summary>The lines that are left.</summary>
    /// <exception cref="InvalidFileException">Names the line that cannot be read.</exception>
    public IEnumerable<JsonlLine> ReadLines()
    {
        while (TryRead(out JsonlLine line))
        {
            yield return line;
        }
    }

    /// <summary>Reads the next line that is not blank; false at the end of the file.</summary>
    /// <exception cref="InvalidFileException">Names the line that cannot be read.</exception>
    public bool TryRead(out JsonlLine line)
    {
        while (TryTakeLine(out ReadOnlySpan<byte> bytes))
        {
            bytes = _line == 1 ? JsonFile.WithoutMark(bytes) : bytes;
            if (bytes.ContainsAnyExcept(" \t\r"u8))
            {
                line = new JsonlLine(_line, JsonFile.Parse(bytes, file, $"line {_line}"));
                return true;
            }
        }

        line = default;
        return false;
    }

    public void Dispose() => stream.Dispose();

    private static byte[] FirstBuffer(int lineBytesMax)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(lineBytesMax, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(lineBytesMax, 1 << 30);
        return new byte[Math.Min(lineBytesMax + 1, 1 << 16)];
    }

    // The bytes up to the next line feed or the end, valid until the next call.
    private bool TryTakeLine(out ReadOnlySpan<byte> bytes)
    {
        int searched = 0;
        while (true)
        {
            int feed = _buffer.AsSpan(_begin + searched, _end - _begin - searched).IndexOf((byte)'\n');
            searched = feed >= 0 ? searched + feed : _end - _begin;
            if (searched > lineBytesMax)
            {
                throw new InvalidFileException(file, $"line {_line + 1}", $"is longer than {lineBytesMax} bytes");
            }

            if (feed >= 0 || !TryFill())
            {
                bytes = _buffer.AsSpan(_begin, searched);
                _begin = Math.Min(_begin + searched + 1, _end);
                bool isLine = feed >= 0 || searched > 0;
                _line = checked(_line + (isLine ? 1 : 0));
                return isLine;
            }
        }
    }

    private bool TryFill()
    {
        if (_begin > 0)
        {
            _buffer.AsSpan(_begin, _end - _begin).CopyTo(_buffer);
            (_begin, _end) = (0, _end - _begin);
        }
        else if (_end == _buffer.Length)
        {
            // One byte more than a line may have, so that a line feed after the longest one still fits.
            Array.Resize(ref _buffer, (int)Math.Min(_buffer.Length * 2L, lineBytesMax + 1L));
        }

        int read = stream.Read(_buffer, _end, _buffer.Length - _end);
        _end += read;
        return read > 0;
    }
}
