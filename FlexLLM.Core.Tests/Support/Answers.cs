using System.Globalization;
using System.Text;

namespace FlexLLM.Tests.Support;

/// <summary>Runs requests and turns answers into text that differs when a single bit does, where the device promises bits.</summary>
internal static class Answers
{
    /// <summary>
    /// Tokens, the bits of their log probabilities and of the alternatives', text and reason of a whole answer.
    /// </summary>
    public static async Task<string> OfAsync(
        CoServingEngine engine, GenerationRequest request, CancellationToken cancellationToken = default)
    {
        var answer = new StringBuilder();
        await foreach (GeneratedToken token in engine.GenerateAsync(request, cancellationToken))
        {
            answer.Append(Of(token));
        }

        return answer.ToString();
    }

    public static Task<string> AskAsync(this CoServingEngine engine, GenerationRequest request) =>
        OfAsync(engine, request).Soon();

    /// <summary>All at once, answers in the order of the requests.</summary>
    public static Task<string[]> AskTogetherAsync(this CoServingEngine engine, IEnumerable<GenerationRequest> requests) =>
        Task.WhenAll(requests.Select(r => OfAsync(engine, r))).Soon();

    /// <summary>One after another.</summary>
    public static async Task<string[]> AskAloneAsync(this CoServingEngine engine, IEnumerable<GenerationRequest> requests)
    {
        var answers = new List<string>();
        foreach (GenerationRequest request in requests)
        {
            answers.Add(await engine.AskAsync(request));
        }

        return [.. answers];
    }

    public static string Of(GeneratedToken token)
    {
        string alternatives = string.Concat(token.TopLogProbs.Select(a => $" {a.TokenId}:{Bits(a.LogProb)}"));
        string end = token.FinishReason is FinishReason reason ? $" {reason} {token.FinishDetail}" : string.Empty;
        return $"[{token.TokenId}:{Bits(token.LogProb)}{alternatives} \"{token.Text}\"{end}]";
    }

    /// <summary>
    /// Requests of many lengths: greedy and sampled, with penalties, with and without alternatives, on these adapters in turn.
    /// </summary>
    public static GenerationRequest[] Mixed(int count, int maxTokens, params string?[] adapters) =>
    [
        .. Enumerable.Range(0, count).Select(i =>
            new GenerationRequest(TinyModel.Ids(Lengths[i % Lengths.Length], (ulong)(100 + i)))
        {
            MaxTokens = maxTokens - (i % 3),
            IgnoreEos = i % 4 != 3,
            Adapter = adapters.Length == 0 ? null : adapters[i % adapters.Length],
            Sampling = (i % 3) switch
            {
                0 => SamplingOptions.Greedy with { LogProbs = 2 },
                1 => new SamplingOptions { Temperature = 0.9f, TopK = 40, TopP = 0.95f, Seed = (ulong)i, LogProbs = 0 },
                _ => new SamplingOptions
                {
                    Temperature = 1.1f,
                    MinP = 0.02f,
                    RepetitionPenalty = 1.2f,
                    PresencePenalty = 0.3f,
                    Seed = (ulong)i,
                    LogProbs = 3,
                },
            },
        }),
    ];

    private static readonly int[] Lengths = [1, 33, 7, 16, 61, 2, 90, 17];

    // Where the device promises values only, a number that is off in its last place is the same answer: the tokens count.
    private static string Bits(float? value) =>
        !TestDevice.IsManaged ? "~"
        : value is float v ? BitConverter.SingleToUInt32Bits(v).ToString("x8", CultureInfo.InvariantCulture) : "-";
}
