using System.Globalization;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>One request of a trace.</summary>
/// <param name="Time">Arrival in seconds since the start of the trace.</param>
/// <param name="PromptTokens">Length of the prompt in tokens.</param>
/// <param name="AnswerTokens">Length of the answer in tokens.</param>
internal readonly record struct TraceArrival(double Time, int PromptTokens, int AnswerTokens);

/// <summary>How lengths of a trace become lengths that a model and a machine can serve.</summary>
/// <param name="Factor">Multiplies both lengths, before the limits.</param>
/// <param name="MaxPrompt">Longest prompt in tokens; longer ones are cut to it.</param>
/// <param name="MaxAnswer">Longest answer in tokens; longer ones are cut to it.</param>
internal sealed record TraceLengths(double Factor = 1.0, int MaxPrompt = int.MaxValue, int MaxAnswer = int.MaxValue)
{
    public TraceArrival Apply(TraceArrival arrival) => arrival with
    {
        PromptTokens = Apply(arrival.PromptTokens, MaxPrompt),
        AnswerTokens = Apply(arrival.AnswerTokens, MaxAnswer),
    };

    // No request is without a prompt or an answer, however small the factor.
    private int Apply(int tokens, int max) => (int)Math.Clamp(Math.Round(tokens * Factor), 1, max);
}

/// <summary>
/// Arrivals of a service in the order of time: the CSV form of the Azure LLM inference traces (TIMESTAMP in UTC with 100 ns,
/// ContextTokens, GeneratedTokens), and slices of it at another rate (paper.md g.2).
/// </summary>
internal sealed class ArrivalTrace
{
    private const string Header = "TIMESTAMP,ContextTokens,GeneratedTokens";

    // Duplicates arrive together as far as a burst goes, and yet not in the same instant.
    private const double JitterSeconds = 0.05;

    private ArrivalTrace(IReadOnlyList<TraceArrival> arrivals, double seconds)
    {
        Arrivals = arrivals;
        Seconds = seconds;
    }

    /// <summary>Sorted by time.</summary>
    public IReadOnlyList<TraceArrival> Arrivals { get; }

    /// <summary>Length in seconds: of the slice, or up to the last arrival of a file.</summary>
    public double Seconds { get; }

    /// <summary>Mean arrivals a second.</summary>
    public double Rate => Arrivals.Count / Seconds;

    public double MeanPromptTokens => Arrivals.Count == 0 ? 0 : Arrivals.Average(a => a.PromptTokens);

    public double MeanAnswerTokens => Arrivals.Count == 0 ? 0 : Arrivals.Average(a => a.AnswerTokens);

    /// <summary>
    /// Arrivals that know nothing of each other, with lengths about as people's first turns have them: for where no trace is at hand.
    /// </summary>
    public static ArrivalTrace Drawn(ulong seed)
    {
        // Many and for long: slices of another rate leave some out, and none should have to repeat any.
        const double perSecond = 20;
        const double seconds = 1200;
        var random = new SeededRandom(seed);
        var arrivals = new List<TraceArrival>();
        for (double at = Gap(ref random); at < seconds; at += Gap(ref random))
        {
            arrivals.Add(new TraceArrival(at, Length(300, 1.2, ref random), Length(260, 0.9, ref random)));
        }

        return new ArrivalTrace(arrivals, seconds);

        static double Gap(ref SeededRandom random) => -Math.Log(1 - random.NextDouble()) / perSecond;

        // Log-normal with that mean.
        static int Length(double mean, double deviation, ref SeededRandom random) => (int)Math.Clamp(
            Math.Round(mean * Math.Exp((deviation * random.NextGaussian()) - (deviation * deviation / 2))), 1, 4096);
    }

    /// <summary>Reads a file.</summary>
    /// <exception cref="InvalidFileException">A missing file, or a row that is broken or earlier than the one before it.</exception>
    public static ArrivalTrace Read(string path)
    {
        if (!File.Exists(path))
        {
            throw new InvalidFileException(path, "file", "does not exist");
        }

        using StreamReader reader = File.OpenText(path);
        return Read(reader, path);
    }

    /// <summary>Reads text; errors name it by <paramref name="path"/>.</summary>
    /// <exception cref="InvalidFileException">A row that is broken, or earlier than the one before it.</exception>
    public static ArrivalTrace Read(TextReader reader, string path)
    {
        if (reader.ReadLine()?.TrimEnd() != Header)
        {
            throw new InvalidFileException(path, "line 1", $"must be the header {Header}");
        }

        var arrivals = new List<TraceArrival>();
        DateTime first = default;
        for (int number = 2; reader.ReadLine() is string line; number++)
        {
            string place = $"line {number}";
            (DateTime time, int prompt, int answer) = ParseRow(line, path, place);
            first = arrivals.Count == 0 ? time : first;
            double seconds = (time - first).TotalSeconds;
            if (arrivals.Count > 0 && seconds < arrivals[^1].Time)
            {
                throw new InvalidFileException(path, place, "is earlier than the line before it; rows must be sorted by time");
            }

            arrivals.Add(new TraceArrival(seconds, prompt, answer));
        }

        return arrivals.Count > 0
            ? new ArrivalTrace(arrivals, arrivals[^1].Time)
            : throw new InvalidFileException(path, "line 2", "is missing; a trace has at least one arrival");
    }

    /// <summary>
    /// A slice of the trace at another mean rate. Its duration and the shape of its bursts stay: arrivals are left out at random,
    /// or are repeated with a jitter of at most 50 ms. The same arguments give the same slice.
    /// </summary>
    /// <param name="rate">Mean arrivals a second of the result.</param>
    /// <param name="seconds">Length of the slice.</param>
    /// <param name="seed">Of every random choice.</param>
    /// <param name="startSecond">Where the slice begins, or null for a random place.</param>
    /// <param name="lengths">Limits on prompts and answers, or null to keep the trace's.</param>
    /// <exception cref="ArgumentException">No such slice: it is longer than the trace, or nothing arrives in it.</exception>
    public ArrivalTrace Scaled(double rate, double seconds, ulong seed, double? startSecond = null, TraceLengths? lengths = null)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(rate);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(seconds);
        var random = new SeededRandom(seed);
        double start = startSecond ?? (random.NextDouble() * Math.Max(0, Seconds - seconds));
        if (start < 0 || start + seconds > Seconds)
        {
            throw new ArgumentException(
                $"The trace is {Seconds:0} s long; a slice of {seconds:0.#} s from second {start:0.#} does not lie within it.");
        }

        TraceArrival[] slice = [.. Arrivals.Where(a => a.Time >= start && a.Time < start + seconds)];
        if (slice.Length == 0)
        {
            throw new ArgumentException($"Nothing arrives in the {seconds:0.#} s from second {start:0.#} of the trace.");
        }

        // Whole copies first, then as many more as are missing, each of another arrival: a sample when there is no whole copy.
        int count = (int)Math.Max(1, Math.Round(rate * seconds));
        random.Shuffle<TraceArrival>(slice);
        var arrivals = new TraceArrival[count];
        for (int i = 0; i < count; i++)
        {
            TraceArrival arrival = slice[i % slice.Length];
            double jitter = i < slice.Length ? 0 : random.NextDouble() * JitterSeconds;
            double time = Math.Min(arrival.Time - start + jitter, Math.BitDecrement(seconds));
            arrivals[i] = (lengths ?? new TraceLengths()).Apply(arrival with { Time = time });
        }

        return new ArrivalTrace([.. arrivals.OrderBy(a => a.Time)], seconds);
    }

    private static (DateTime Time, int Prompt, int Answer) ParseRow(string line, string path, string place)
    {
        string[] fields = line.TrimEnd().Split(',');
        if (fields.Length != 3)
        {
            throw new InvalidFileException(path, place, $"has {fields.Length} fields instead of 3: {Header}");
        }

        return DateTime.TryParseExact(
            fields[0], "yyyy-MM-dd HH:mm:ss.FFFFFFF", CultureInfo.InvariantCulture, DateTimeStyles.None, out DateTime time)
            ? (time, Tokens(fields[1], "ContextTokens"), Tokens(fields[2], "GeneratedTokens"))
            : throw new InvalidFileException(
                path, place, $"TIMESTAMP '{fields[0]}' is no time such as 2023-11-16 18:15:46.6805900");

        int Tokens(string field, string column) =>
            int.TryParse(field, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out int tokens) && tokens >= 1
                ? tokens
                : throw new InvalidFileException(path, place, $"{column} '{field}' is no number of tokens, which is at least 1");
    }
}
