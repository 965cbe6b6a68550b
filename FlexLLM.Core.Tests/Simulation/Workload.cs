using FlexLLM.Primitives;

namespace FlexLLM.Tests.Simulation;

/// <summary>One request of a simulated caller.</summary>
internal readonly record struct Arrival(TimeSpan Time, int PromptTokens, int AnswerTokens);

/// <summary>Requests that come like a Poisson process, their lengths exponentially distributed up to a bound.</summary>
internal sealed record Workload
{
    public static readonly Workload None = new() { Requests = 0, RequestsPerSecond = 1.0 };

    public required int Requests { get; init; }

    public required double RequestsPerSecond { get; init; }

    /// <summary>When they begin to come.</summary>
    public TimeSpan Begins { get; init; }

    public int PromptMean { get; init; } = 256;

    public int AnswerMean { get; init; } = 64;

    /// <summary>Longest prompt, and longest answer, in tokens.</summary>
    public int TokensMax { get; init; } = 1000;

    /// <summary>Tokens that prompts begin with, where they are that long: one of <see cref="Beginnings"/> texts.</summary>
    public int BeginningTokens { get; init; }

    public int Beginnings { get; init; } = 3;

    /// <summary>Further requests that come all at once.</summary>
    public int BurstRequests { get; init; }

    public TimeSpan BurstTime { get; init; }

    public Arrival[] Draw(ulong seed)
    {
        var random = new SeededRandom(seed);
        var arrivals = new List<Arrival>();
        TimeSpan time = Begins;
        for (int i = 0; i < Requests; i++)
        {
            time += TimeSpan.FromSeconds(Exponential(ref random) / RequestsPerSecond);
            arrivals.Add(DrawAt(time, ref random));
        }

        for (int i = 0; i < BurstRequests; i++)
        {
            arrivals.Add(DrawAt(BurstTime, ref random));
        }

        return [.. arrivals.OrderBy(a => a.Time)];
    }

    private Arrival DrawAt(TimeSpan time, ref SeededRandom random) =>
        new(time, Length(PromptMean, ref random), Length(AnswerMean, ref random));

    private int Length(int mean, ref SeededRandom random) => Math.Min(TokensMax, 1 + (int)(mean * Exponential(ref random)));

    private static double Exponential(ref SeededRandom random) => -Math.Log(1.0 - random.NextDouble());
}
