using System.Buffers.Text;
using System.Security.Cryptography;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>
/// What happened in a simulated engine, a line an event, and the digest of it: two runs with one digest did the same. The lines are kept
/// where somebody wants to read them; the digest is then the first 16 digits of the file's SHA-256.
/// </summary>
internal sealed class EventLog : IDisposable
{
    private const int LineBytesMax = 512;

    private static ReadOnlySpan<byte> Legend =>
        """
        # times in ticks of 100 ns since the start
        # step BEGUN TOOK INFERENCE_ROWS INFERENCE_CONTEXT FORWARD_ROWS BACKWARD_ROWS (those of each layer)
        # admit REQUEST, preempt REQUEST: in the step that follows
        # given-up BEGUN TOOK: a step of finetuning alone that a request ended
        # token REQUEST ID: generated in the step before

        """u8;

    private readonly IncrementalHash _hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
    private readonly FileStream? _file;
    private readonly byte[] _line = new byte[LineBytesMax];

    /// <param name="file">Where to keep the lines; null to know their digest alone.</param>
    public EventLog(string? file)
    {
        _file = file is null ? null : File.Create(file);
        Append(Legend);
    }

    /// <summary>The file of a run in a folder; null where there is none. Names of modes and loads can have slashes.</summary>
    public static string? PathIn(string? folder, string run) =>
        folder is null ? null : Path.Combine(folder, $"{run.Replace('/', '.')}.log");

    /// <summary>First 16 hexadecimal digits of the SHA-256 of all lines so far.</summary>
    public string Digest => Convert.ToHexString(_hash.GetCurrentHash())[..16];

    public void Write(ReadOnlySpan<byte> name, params ReadOnlySpan<long> values)
    {
        name.CopyTo(_line);
        int length = name.Length;
        foreach (long value in values)
        {
            _line[length++] = (byte)' ';
            Utf8Formatter.TryFormat(value, _line.AsSpan(length), out int digits);
            length += digits;
        }

        _line[length++] = (byte)'\n';
        Append(_line.AsSpan(0, length));
    }

    public void Dispose()
    {
        _file?.Dispose();
        _hash.Dispose();
    }

    private void Append(ReadOnlySpan<byte> lines)
    {
        _hash.AppendData(lines);
        _file?.Write(lines);
    }
}
