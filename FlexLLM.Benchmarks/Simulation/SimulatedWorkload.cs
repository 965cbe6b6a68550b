using FlexLLM.Benchmarks.Serving;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>
/// Traffic and training data like the paper's (paper.md g.2): arrivals whose rate wanders as BurstGPT's does, lengths with the means
/// of ShareGPT's first turns, samples with the mean of Sky-T1's. The shape of the bursts depends on the seed alone, so
/// that one seed at several rates is one trace scaled, as the authors scale theirs.
/// </summary>
internal sealed record SimulatedWorkload
{
    /// <summary>Longest prompt and answer together, and longest sample.</summary>
    public const int TokensMax = 8192;

    // The rate's logarithm: how long it remembers, and how often it changes.
    private const double RateMemorySeconds = 60;
    private const double RateBinSeconds = 10;

    public const double DefaultBurst = 0.1;

    public required double RequestsPerSecond { get; init; }

    /// <summary>
    /// Deviation of the rate's logarithm. The authors' slice has peaks of 1.8 times the mean (paper.md g.8); 0.35 has them too, but
    /// fills the KV cache at 20 requests a second as theirs was not.
    /// </summary>
    public double Burst { get; init; } = DefaultBurst;

    public double Seconds { get; init; } = 600;

    /// <summary>
    /// Tokens of a prompt: what vLLM's saturation says. It generates 2,835 to 3,005 tokens/s in steps of 38.5 ms that are full with 256
    /// rows (paper.md g.6), so that 260 generated tokens come with about 310 of prompt.
    /// </summary>
    public double PromptMean { get; init; } = 300;

    /// <summary>Tokens of an answer: generated tokens a second over requests a second, at every rate of g.5.</summary>
    public double AnswerMean { get; init; } = 260;

    /// <summary>
    /// Tokens of a finetuning sample: with one sample an iteration, the authors' unlimited temporal sharing trains 5,650 / 4,370 /
    /// 4,330 tokens/s in iterations of 640 / 841 / 848 ms (paper.md g.7), that is 3,616 to 3,675 tokens an iteration.
    /// </summary>
    public double SampleMean { get; init; } = 3600;

    /// <summary>Arrivals of another service, of which the times are taken; null draws them.</summary>
    public ArrivalTrace? Trace { get; init; }

    /// <summary>Whether its lengths are taken too, each cut to half of <see cref="TokensMax"/>; else they are drawn.</summary>
    public bool KeepsTraceLengths { get; init; }

    /// <summary>Arrivals in the order of time, all within the workload's seconds.</summary>
    public TraceArrival[] Draw(ulong seed)
    {
        var lengths = new TraceLengths(1, MaxPrompt: TokensMax / 2, MaxAnswer: TokensMax / 2);
        ArrivalTrace? trace = Trace?.Scaled(RequestsPerSecond, Seconds, seed, lengths: lengths);
        if (trace is not null && KeepsTraceLengths)
        {
            return [.. trace.Arrivals];
        }

        double[] times = trace is null ? DrawTimes(seed) : [.. trace.Arrivals.Select(a => a.Time)];
        var random = new SeededRandom(seed + 3);
        int[] prompts = DrawLengths(times.Length, PromptMean, deviation: 1.2, TokensMax / 2, ref random);
        int[] answers = DrawLengths(times.Length, AnswerMean, deviation: 0.9, TokensMax / 2, ref random);
        return [.. times.Select((time, i) => new TraceArrival(time, prompts[i], answers[i]))];
    }

    /// <summary>Lengths of the finetuning samples; the same for every rate.</summary>
    public int[] DrawSamples(ulong seed, int count = 1000)
    {
        var random = new SeededRandom(seed + 2);
        return DrawLengths(count, SampleMean, deviation: 0.5, TokensMax - 1, ref random);
    }

    private double[] DrawTimes(ulong seed)
    {
        double[] share = DrawRates(seed);
        int count = (int)Math.Max(1, Math.Round(RequestsPerSecond * Seconds));
        var random = new SeededRandom(seed + 1);

        // Squares of normal numbers: gamma-distributed intervals of shape 1/2, more irregular than a Poisson process.
        double[] at = new double[count];
        double sum = 0;
        for (int i = 0; i < count; i++)
        {
            double z = random.NextGaussian();
            at[i] = sum += z * z;
        }

        sum += 1;
        double[] times = new double[count];
        int bin = 0;
        double before = 0; // Share of all arrivals before the bin.
        for (int i = 0; i < count; i++)
        {
            double position = at[i] / sum;
            while (bin < share.Length - 1 && position > before + share[bin])
            {
                before += share[bin++];
            }

            double time = (bin + ((position - before) / share[bin])) * Seconds / share.Length;
            times[i] = Math.Clamp(time, 0, Math.BitDecrement(Seconds));
        }

        return times;
    }

    // Share of the arrivals in each bin: the exponential of a process that forgets.
    private double[] DrawRates(ulong seed)
    {
        var random = new SeededRandom(seed);
        double[] rates = new double[Math.Max(1, (int)(Seconds / RateBinSeconds))];
        double keeps = Math.Exp(-RateBinSeconds / RateMemorySeconds);
        double level = random.NextGaussian();
        for (int i = 0; i < rates.Length; i++)
        {
            rates[i] = Math.Exp(Burst * level);
            level = (keeps * level) + (Math.Sqrt(1 - (keeps * keeps)) * random.NextGaussian());
        }

        double sum = rates.Sum();
        return [.. rates.Select(r => r / sum)];
    }

    // Log-normal, scaled so that few draws have the mean too: one load must not be heavier than another by chance.
    private static int[] DrawLengths(int count, double mean, double deviation, int max, ref SeededRandom random)
    {
        double[] lengths = new double[count];
        foreach (ref double length in lengths.AsSpan())
        {
            length = Math.Exp(deviation * random.NextGaussian());
        }

        for (int pass = 0; pass < 4; pass++) // What the limit cuts off is made up for.
        {
            double factor = mean / lengths.Average();
            lengths = [.. lengths.Select(l => Math.Clamp(l * factor, 2, max))];
        }

        return [.. lengths.Select(l => (int)Math.Round(l))];
    }
}
