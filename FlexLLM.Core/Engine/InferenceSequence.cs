using System.Threading.Channels;
using FlexLLM.Adapters;
using FlexLLM.Execution;
using FlexLLM.KvCache;
using FlexLLM.Scheduling;
using FlexLLM.Tokenization;

namespace FlexLLM.Engine;

/// <summary>
/// A request as its caller's thread left it: encoded, checked, and no longer tied to objects that the caller can change.
/// </summary>
/// <param name="Prompt">Token ids.</param>
/// <param name="Sampling">All defaults filled in but the seed.</param>
/// <param name="Stops">Stop sequences.</param>
/// <param name="Arrived">Clock timestamp of the caller's call: waiting for a place and for the loop counts as TTFT.</param>
/// <param name="OnEnded">Called once when the request no longer takes a place.</param>
internal sealed record PreparedRequest(int[] Prompt, SamplingParameters Sampling, StopSequences Stops, long Arrived, Action OnEnded);

/// <summary>
/// One request inside the engine. The loop thread owns it; the caller only reads its stream and may ask for its end.
/// </summary>
internal sealed class InferenceSequence
{
    // Bounded by the request's own token limit: a slow reader holds up nobody.
    private readonly Channel<GeneratedToken> _stream = Channel.CreateUnbounded<GeneratedToken>(
        new UnboundedChannelOptions { SingleReader = true, SingleWriter = true });

    private volatile bool _cancelRequested;
    private int _ended;

    public required SequenceId Id { get; init; }

    /// <summary>Prompt and generated tokens.</summary>
    public required List<int> Tokens { get; init; }

    public required int PromptLength { get; init; }

    public required int TokensMax { get; init; }

    public required SamplingParameters Sampling { get; init; }

    public required TokenHistory History { get; init; }

    public required StopMatcher Stops { get; init; }

    /// <summary>Null when the checkpoint has no tokenizer: the stream then carries token ids alone.</summary>
    public required StreamingDecoder? Decoder { get; init; }

    /// <summary>Called once, by whichever comes first: the loop is done with the request, or its reader is.</summary>
    public required Action OnEnded { get; init; }

    public required bool IgnoreEos { get; init; }

    public required int Priority { get; init; }

    public required ServiceLevelObjective Slo { get; init; }

    public required TimeSpan ArrivalTime { get; init; }

    /// <summary>Who pays for it.</summary>
    public required Tenant Tenant { get; init; }

    /// <summary>Whether its tenant was charged for its prompt, which happens with its first place.</summary>
    public bool PromptCharged { get; set; }

    /// <summary>The version that serves this request to its end; held by a reference.</summary>
    public required AdapterVersion? Adapter { get; init; }

    public BlockTable Blocks { get; } = new();

    public SequencePhase Phase { get; set; } = SequencePhase.Waiting;

    /// <summary>Tokens whose keys and values are in the cache.</summary>
    public int Computed { get; set; }

    public TimeSpan? FirstTokenTime { get; set; }

    public TimeSpan? LastTokenTime { get; set; }

    public int Generated => Tokens.Count - PromptLength;

    public bool CancelRequested => _cancelRequested;

    public ChannelReader<GeneratedToken> Stream => _stream.Reader;

    /// <summary>May be called from any thread; the loop acts on it before its next step.</summary>
    public void RequestCancel() => _cancelRequested = true;

    /// <summary>The request no longer takes a place in the engine. May be called from any thread, any number of times.</summary>
    public void End()
    {
        if (Interlocked.Exchange(ref _ended, 1) == 0)
        {
            OnEnded();
        }
    }

    public void Deliver(GeneratedToken token) => _stream.Writer.TryWrite(token);

    /// <summary>Ends the stream, with an error or without.</summary>
    public void CloseStream(Exception? error = null) => _stream.Writer.TryComplete(error);

    public SequenceSnapshot Snapshot() => new()
    {
        Id = Id,
        Phase = Phase,
        TokensTotal = Tokens.Count,
        TokensComputed = Computed,
        TokensMax = TokensMax,
        BlocksHeld = Blocks.Count,
        Priority = Priority,
        ArrivalTime = ArrivalTime,
        FirstTokenTime = FirstTokenTime,
        TokensGenerated = Generated,
        TpotTarget = Slo.TimePerOutputToken,
        TtftTarget = Slo.TimeToFirstToken,
        InterTokenTarget = Slo.InterTokenLatency,
        Tenant = Tenant.Slot,
        ServiceDue = PromptCharged ? 0 : PromptLength,
    };
}
