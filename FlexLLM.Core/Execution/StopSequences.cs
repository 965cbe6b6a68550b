using System.Text;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>
/// Strings that end an answer, prepared for matching; immutable, shared by requests. The answer ends with the first
/// character that completes any of them, and is cut before the longest one that ends there.
/// </summary>
internal sealed class StopSequences
{
    /// <summary>Most stop strings of one request.</summary>
    public const int CountMax = 16;

    /// <summary>Most UTF-16 characters of one stop string.</summary>
    public const int LengthMax = 256;

    private readonly int[][] _borders;

    /// <summary>Prepares these strings; an empty list never matches.</summary>
    /// <exception cref="ArgumentException">
    /// A string is empty, too long, starts inside a surrogate pair, or there are too many.
    /// </exception>
    public StopSequences(IReadOnlyList<string> stops)
    {
        if (stops.Count > CountMax)
        {
            throw new ArgumentException($"At most {CountMax} stop strings can be given, not {stops.Count}.", nameof(stops));
        }

        foreach (string stop in stops)
        {
            if (string.IsNullOrEmpty(stop) || stop.Length > LengthMax || char.IsLowSurrogate(stop[0]))
            {
                throw new ArgumentException(
                    $"A stop string has 1 to {LengthMax} characters and starts with a whole one.", nameof(stops));
            }
        }

        Strings = [.. stops];
        _borders = [.. stops.Select(BordersOf)];
    }

    /// <summary>No stop strings.</summary>
    public static StopSequences None { get; } = new([]);

    /// <summary>The strings, as given.</summary>
    public IReadOnlyList<string> Strings { get; }

    /// <summary>
    /// Characters of stop <paramref name="index"/> matched after one more, when <paramref name="matched"/> were before.
    /// </summary>
    internal int Advance(int index, int matched, char next)
    {
        string stop = Strings[index];
        int[] borders = _borders[index];
        while (matched > 0 && stop[matched] != next)
        {
            matched = borders[matched - 1];
        }

        return stop[matched] == next ? matched + 1 : 0;
    }

    // Knuth-Morris-Pratt: borders[i] = length of the longest proper prefix of stop[..(i+1)] that is also its suffix.
    private static int[] BordersOf(string stop)
    {
        var borders = new int[stop.Length];
        int matched = 0;
        for (int i = 1; i < stop.Length; i++)
        {
            while (matched > 0 && stop[matched] != stop[i])
            {
                matched = borders[matched - 1];
            }

            matched += stop[matched] == stop[i] ? 1 : 0;
            borders[i] = matched;
        }

        return borders;
    }
}

/// <summary>
/// Finds stop strings in one answer as its text arrives. Text that may yet turn out to be the beginning of a stop string is
/// held back; the result does not depend on how the text was cut into pieces.
/// </summary>
internal sealed class StopMatcher(StopSequences stops)
{
    private readonly int[] _matched = new int[stops.Strings.Count];
    private readonly StringBuilder _held = new();

    /// <summary>The stop string that ended the answer, or null so far.</summary>
    public string? Matched { get; private set; }

    /// <summary>Whether a stop string was found; nothing may be appended after.</summary>
    public bool Stopped => Matched is not null;

    /// <summary>Takes the next piece of the answer and returns what may be shown now, possibly nothing.</summary>
    public string Append(string text)
    {
        Check.That(!Stopped);
        if (_matched.Length == 0)
        {
            return text;
        }

        foreach (char next in text)
        {
            _held.Append(next);
            for (int i = 0; i < _matched.Length; i++)
            {
                string stop = stops.Strings[i];
                _matched[i] = stops.Advance(i, _matched[i], next);
                if (_matched[i] == stop.Length && stop.Length > (Matched?.Length ?? 0))
                {
                    Matched = stop;
                }
            }

            if (Stopped)
            {
                _held.Length -= Matched!.Length;
                return Flush();
            }
        }

        return Take(_held.Length - _matched.Max());
    }

    /// <summary>The answer ended otherwise: returns what was held back.</summary>
    public string Flush() => Take(_held.Length);

    private string Take(int length)
    {
        string text = _held.ToString(0, length);
        _held.Remove(0, length);
        return text;
    }
}
