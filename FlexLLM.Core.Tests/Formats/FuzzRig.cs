using System.Text;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Formats;

/// <summary>
/// Feeds a reader valid bytes with seeded damage. A reader may accept or throw InvalidFileException; anything else, and a case
/// that does not end, is a finding.
/// </summary>
internal static class FuzzRig
{
    private static readonly string[] Numbers =
    [
        "0", "-1", "1", "3", "4294967296", "9223372036854775807", "-9223372036854775808", "18446744073709551616", "1e999", "0.5",
    ];

    private static readonly string[] Fragments =
    [
        "{", "}", "[", "]", "\"", ",", ":", "null", "\\", "\\ud800", "\\u0000", "\n", "\r", "\uFEFF", "true", "[[[[[[[[",
        "{\"a\":", "\"dtype\":", "0",
    ];

    /// <summary>Runs the cases and returns the first findings; empty when the reader is sound.</summary>
    public static List<string> Run(int seed, int cases, byte[] valid, Action<byte[]> read, TimeSpan? timeout = null)
    {
        var findings = new List<string>();
        int current = -1;
        var thread = new Thread(() =>
        {
            for (int i = 0; i < cases && findings.Count < 5; i++)
            {
                Volatile.Write(ref current, i);
                var random = new SeededRandom(((ulong)seed << 32) | (uint)i);
                try
                {
                    read(i == 0 ? valid : Mutate(ref random, valid));
                }
                catch (InvalidFileException) when (i > 0)
                {
                    // The one permitted refusal; the undamaged first case must be accepted.
                }
                catch (Exception e)
                {
                    findings.Add($"seed {seed}, case {i}: {e.GetType().Name}: {e.Message}");
                }
            }
        })
        { IsBackground = true };
        thread.Start();

        // The limit is the reader's, not the beginning thread's.
        SpinWait.SpinUntil(() => Volatile.Read(ref current) >= 0 || !thread.IsAlive);
        return thread.Join(timeout ?? TimeSpan.FromSeconds(60))
            ? findings
            : [$"seed {seed}, case {Volatile.Read(ref current)}: does not end"];
    }

    private static byte[] Mutate(ref SeededRandom random, byte[] valid)
    {
        List<byte> bytes = [.. valid];
        for (int edits = 1 + random.Next(3); edits > 0 && bytes.Count > 0; edits--)
        {
            int at = random.Next(bytes.Count);
            switch (random.Next(7))
            {
                case 0:
                    bytes[at] ^= (byte)(1 << random.Next(8));
                    break;
                case 1:
                    bytes[at] = (byte)random.Next(256);
                    break;
                case 2:
                    bytes.RemoveRange(at, bytes.Count - at);
                    break;
                case 3:
                    bytes.RemoveRange(at, Math.Min(1 + random.Next(12), bytes.Count - at));
                    break;
                case 4:
                    bytes.InsertRange(at, Encoding.UTF8.GetBytes(Fragments[random.Next(Fragments.Length)]));
                    break;
                case 5:
                    bytes.InsertRange(at, bytes.GetRange(at, Math.Min(1 + random.Next(40), bytes.Count - at)));
                    break;
                default:
                    ReplaceNumber(ref random, bytes, at);
                    break;
            }
        }

        return [.. bytes];
    }

    private static void ReplaceNumber(ref SeededRandom random, List<byte> bytes, int at)
    {
        int begin = bytes.FindIndex(at, value => value is >= (byte)'0' and <= (byte)'9');
        if (begin >= 0)
        {
            int end = begin;
            while (end < bytes.Count && bytes[end] is >= (byte)'0' and <= (byte)'9')
            {
                end++;
            }

            bytes.RemoveRange(begin, end - begin);
            bytes.InsertRange(begin, Encoding.UTF8.GetBytes(Numbers[random.Next(Numbers.Length)]));
        }
    }
}
