using System.Text.Json;

namespace FlexLLM.Formats;

/// <summary>
/// Writes a file so that its name only ever shows the old or the complete new content: into "NAME.tmp" beside it, flushed to
/// the disk, then moved over. A second writer of the same name fails with an IOException and harms nothing.
/// </summary>
internal static class AtomicFile
{
    public static void Write(string path, Action<Stream> write)
    {
        string temporary = path + ".tmp";

        // Opened outside the try: when another writer holds the file, it is not ours to delete.
        var stream = new FileStream(temporary, FileMode.Create, FileAccess.Write, FileShare.None, 1 << 16);
        try
        {
            using (stream)
            {
                write(stream);
                stream.Flush(flushToDisk: true);
            }

            File.Move(temporary, path, overwrite: true);
        }
        catch
        {
            File.Delete(temporary);
            throw;
        }
    }

    /// <summary>Writes an indented JSON file.</summary>
    public static void WriteJson(string path, Action<Utf8JsonWriter> write) => Write(path, stream => WriteJson(stream, write));

    /// <summary>Writes indented JSON and a final line feed.</summary>
    public static void WriteJson(Stream stream, Action<Utf8JsonWriter> write)
    {
        using (var json = new Utf8JsonWriter(stream, new JsonWriterOptions { Indented = true, NewLine = "\n" }))
        {
            write(json);
        }

        stream.WriteByte((byte)'\n');
    }
}
