using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>
/// What one sequence has said so far, as penalties read it: how often each token was generated, and which were in the
/// prompt. Survives preemption. Counting can be off, for the requests (most) that have no penalty.
/// </summary>
internal sealed class TokenHistory(bool countsTokens)
{
    private readonly Dictionary<int, int> _generatedByToken = []; // 0 for a token of the prompt only.

    /// <summary>Tokens generated so far; picks the random number of the next one.</summary>
    public int GeneratedCount { get; private set; }

    /// <summary>Whether the tokens themselves are kept.</summary>
    public bool CountsTokens { get; } = countsTokens;

    /// <summary>Each token seen in prompt or answer once, with the number of times it was generated.</summary>
    public Dictionary<int, int> GeneratedByToken => _generatedByToken;

    /// <summary>Notes the tokens of the prompt.</summary>
    public void AddPrompt(ReadOnlySpan<int> tokens)
    {
        if (!CountsTokens)
        {
            return;
        }

        foreach (int token in tokens)
        {
            _generatedByToken.TryAdd(token, 0);
        }
    }

    /// <summary>Notes a token that the model generated.</summary>
    public void AddGenerated(int token)
    {
        Check.That(token >= 0);
        GeneratedCount++;
        if (CountsTokens)
        {
            _generatedByToken[token] = _generatedByToken.GetValueOrDefault(token) + 1;
        }
    }
}
