using System.Text.Json;
using System.Text.Unicode;

namespace FlexLLM.Formats;

/// <summary>
/// The one way in for JSON from files: size and depth bounded, strict UTF-8, no duplicate keys, and no text that a later
/// GetString could choke on. Whatever is wrong becomes an <see cref="InvalidFileException"/>.
/// </summary>
internal static class JsonFile
{
    /// <summary>Deepest nesting accepted.</summary>
    public const int DepthMax = 64;

    /// <summary>Largest config-like file, in bytes.</summary>
    public const long ConfigBytesMax = 16L << 20;

    private static readonly JsonDocumentOptions Options = new() { MaxDepth = DepthMax, AllowDuplicateProperties = false };

    /// <summary>Reads and parses a whole file of at most <paramref name="bytesMax"/> bytes.</summary>
    public static JsonElement Load(string path, long bytesMax = ConfigBytesMax)
    {
        var info = new FileInfo(path);
        if (!info.Exists)
        {
            throw new InvalidFileException(path, "file", "does not exist");
        }

        if (info.Length > bytesMax)
        {
            throw new InvalidFileException(path, "file", $"has {info.Length} bytes; at most {bytesMax} are read");
        }

        return Parse(WithoutMark(File.ReadAllBytes(path)), path, "JSON");
    }

    /// <summary>The text after its byte order mark, if it has one.</summary>
    public static ReadOnlySpan<byte> WithoutMark(ReadOnlySpan<byte> utf8) => utf8.StartsWith("\uFEFF"u8) ? utf8[3..] : utf8;

    /// <summary>Parses one JSON value. The result owns its memory.</summary>
    /// <param name="utf8">The text.</param>
    /// <param name="file">File named in errors.</param>
    /// <param name="field">Part of the file named in errors: "JSON", "header", "line 7".</param>
    public static JsonElement Parse(ReadOnlySpan<byte> utf8, string file, string field)
    {
        if (!Utf8.IsValid(utf8))
        {
            throw new InvalidFileException(file, field, "is not valid UTF-8");
        }

        try
        {
            CheckEscapes(utf8);
            return JsonElement.Parse(utf8, Options);
        }
        catch (JsonException e)
        {
            throw new InvalidFileException(file, field, $"is not valid JSON: {e.Message}", e);
        }
    }

    /// <summary>Text of a file, shortened for an error message.</summary>
    public static string Quote(string text) => text.Length <= 80 ? $"'{text}'" : $"'{text.AsSpan(0, 77)}...'";

    // The parser takes an escaped lone surrogate ("\ud800") for valid and only throws when the string is read, by then
    // with an exception that names no file.
    private static void CheckEscapes(ReadOnlySpan<byte> utf8)
    {
        if (!utf8.Contains((byte)'\\'))
        {
            return;
        }

        var reader = new Utf8JsonReader(utf8, new JsonReaderOptions { MaxDepth = DepthMax });
        while (reader.Read())
        {
            if (reader.TokenType is not (JsonTokenType.String or JsonTokenType.PropertyName) || !reader.ValueIsEscaped)
            {
                continue;
            }

            try
            {
                reader.GetString();
            }
            catch (InvalidOperationException e)
            {
                throw new JsonException($"broken escape sequence in the string before byte {reader.BytesConsumed}", e);
            }
        }
    }
}
