namespace FlexLLM;

/// <summary>What a request is to its caller.</summary>
public enum RequestClass
{
    /// <summary>Somebody waits: <see cref="CoServingOptions.Slo"/> holds.</summary>
    Interactive,

    /// <summary>Nobody watches: <see cref="CoServingOptions.BatchSlo"/> holds, and interactive requests go first.</summary>
    Batch,
}

/// <summary>One prompt and how to answer it.</summary>
public sealed record GenerationRequest
{
    /// <summary>A request for the continuation of a text.</summary>
    /// <param name="prompt">
    /// Text; the tokenizer's begin-of-sequence token is put in front where it has one. Special tokens spelled out in it are recognised:
    /// pass text of strangers as <see cref="ChatMessage"/>s, whose contents never are.
    /// </param>
    public GenerationRequest(string prompt)
    {
        ArgumentNullException.ThrowIfNull(prompt);
        Prompt = prompt;
    }

    /// <summary>A request for the assistant's next turn; needs a checkpoint with a known chat template.</summary>
    /// <param name="messages">The conversation, oldest first.</param>
    public GenerationRequest(IReadOnlyList<ChatMessage> messages)
    {
        ArgumentNullException.ThrowIfNull(messages);
        Messages = messages;
    }

    /// <summary>A request for the continuation of token ids, taken as they are.</summary>
    /// <param name="promptTokens">At least one id of the model's vocabulary.</param>
    public GenerationRequest(IReadOnlyList<int> promptTokens)
    {
        ArgumentNullException.ThrowIfNull(promptTokens);
        PromptTokens = promptTokens;
    }

    /// <summary>Text to continue, or null.</summary>
    public string? Prompt { get; }

    /// <summary>Conversation to answer, or null.</summary>
    public IReadOnlyList<ChatMessage>? Messages { get; }

    /// <summary>Token ids to continue, or null.</summary>
    public IReadOnlyList<int>? PromptTokens { get; }

    /// <summary>
    /// Adapter that answers, or null for the bare model. The version published at admission serves the whole request.
    /// </summary>
    public string? Adapter { get; init; }

    /// <summary>Most tokens to generate.</summary>
    /// <value>256.</value>
    public int MaxTokens { get; init; } = 256;

    /// <summary>
    /// How tokens are chosen; what it leaves open comes from the checkpoint's generation_config.json, else greedy.
    /// </summary>
    public SamplingOptions Sampling { get; init; } = new();

    /// <summary>Texts that end the answer; they are not part of it.</summary>
    public IReadOnlyList<string> StopSequences { get; init; } = [];

    /// <summary>Goes on past end-of-sequence tokens up to <see cref="MaxTokens"/>.</summary>
    public bool IgnoreEos { get; init; }

    /// <summary>
    /// Higher goes first; waiting makes up for it in time, so that none starves. <see cref="RequestClass.Batch"/> requests count one
    /// level lower than they say: one of priority 1 stands beside interactive ones of priority 0.
    /// </summary>
    public int Priority { get; init; }

    /// <summary>Which latency targets hold, and who goes first.</summary>
    /// <value><see cref="RequestClass.Interactive"/>.</value>
    public RequestClass Class { get; init; }

    /// <summary>
    /// Who pays: of waiting requests of one priority, those go first whose tenant got least so far, counting prompt tokens and
    /// generated tokens twice (virtual token counters; Sheng et al., OSDI'24). Null, or empty, is one tenant too.
    /// </summary>
    public string? Tenant { get; init; }

    /// <summary>Latency targets of this request, or null for the engine's targets of its class.</summary>
    public ServiceLevelObjective? Slo { get; init; }

    internal int PriorityLevel => Class == RequestClass.Batch ? Math.Max(Priority, int.MinValue + 1) - 1 : Priority;
}

/// <summary>Why an answer ended.</summary>
public enum FinishReason
{
    /// <summary>An end-of-sequence token or a stop sequence.</summary>
    Stop,

    /// <summary>The request's token limit, or the end of the context.</summary>
    Length,

    /// <summary>The request could not be continued; <see cref="GeneratedToken.FinishDetail"/> says why.</summary>
    Error,
}

/// <summary>
/// One item of an answer's stream. Text may lag behind tokens: it is given out once its characters are complete and can no
/// longer become part of a stop sequence. The last item has a <see cref="FinishReason"/>.
/// </summary>
public sealed record GeneratedToken
{
    /// <summary>The token, or -1 for a last item that carries no token.</summary>
    public required int TokenId { get; init; }

    /// <summary>Text that became final with this token; may be empty.</summary>
    public required string Text { get; init; }

    /// <summary>Natural logarithm of the token's probability, where log probabilities were asked for.</summary>
    public float? LogProb { get; init; }

    /// <summary>The most probable tokens at this place, where alternatives were asked for.</summary>
    public IReadOnlyList<TokenLogProb> TopLogProbs { get; init; } = [];

    /// <summary>Set on the last item.</summary>
    public FinishReason? FinishReason { get; init; }

    /// <summary>The cause of an error.</summary>
    public string? FinishDetail { get; init; }

    internal static GeneratedToken Failed(string cause) =>
        new() { TokenId = -1, Text = string.Empty, FinishReason = FlexLLM.FinishReason.Error, FinishDetail = cause };
}

/// <summary>A whole answer.</summary>
public sealed record GenerationResult
{
    /// <summary>The generated tokens; an end-of-sequence token that ended the answer is the last one.</summary>
    public required IReadOnlyList<int> Tokens { get; init; }

    /// <summary>Their text, without special tokens and without the stop sequence.</summary>
    public required string Text { get; init; }

    /// <summary>Why it ended.</summary>
    public required FinishReason FinishReason { get; init; }

    /// <summary>Time from the call to the first token, waiting included.</summary>
    public required TimeSpan TimeToFirstToken { get; init; }

    /// <summary>Time from the call to the end.</summary>
    public required TimeSpan Duration { get; init; }

    /// <summary>The cause of an error.</summary>
    public string? FinishDetail { get; init; }
}
