using System.Runtime.InteropServices;
using System.Threading.Channels;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.KvCache;
using FlexLLM.Primitives;
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

    /// <summary>The first of its blocks that others could share. While it waits, what it could share.</summary>
    public required PrefixPath Prefix { get; init; }

    public BlockTable Blocks { get; } = new();

    public SequencePhase Phase { get; private set; } = SequencePhase.Waiting;

    /// <summary>Tokens whose keys and values are in its blocks.</summary>
    public int Computed { get; private set; }

    public TimeSpan? FirstTokenTime { get; set; }

    public TimeSpan? LastTokenTime { get; set; }

    /// <summary>Time that finetuning had taken in this engine before the first token.</summary>
    public TimeSpan FinetuningBefore { get; set; }

    /// <summary>Tokens that came later after the one before than the inter-token target allows.</summary>
    public int TokensLate { get; set; }

    public int Generated => Tokens.Count - PromptLength;

    /// <summary>What its tenant has to pay for it on admission: the prompt tokens that must be computed.</summary>
    public int ServiceDue => PromptCharged ? 0 : Math.Max(0, PromptLength - (Prefix.Count * DeviceKvCache.TokensPerBlock));

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

    /// <summary>It runs from now on, with the blocks that it found in its last snapshot.</summary>
    public void Admit(KvPool pool)
    {
        Check.That(Phase == SequencePhase.Waiting && Computed == 0);
        pool.Prefixes?.Adopt(Prefix, Blocks);
        Computed = Prefix.Count * DeviceKvCache.TokensPerBlock;
        Phase = SequencePhase.Running;
    }

    /// <summary>So many more of its tokens have keys and values in its blocks.</summary>
    public void Advance(int tokens, KvPool pool)
    {
        Computed += tokens;
        pool.Prefixes?.Publish(Prefix, CollectionsMarshal.AsSpan(Tokens), Computed, Blocks);
    }

    /// <summary>It gives up its blocks and waits; what it generated stays.</summary>
    public void Preempt(KvPool pool)
    {
        Blocks.Release(pool.Blocks);
        Phase = SequencePhase.Waiting;
        Computed = 0;
    }

    public SequenceSnapshot Snapshot(KvPool pool)
    {
        bool runs = Phase == SequencePhase.Running;
        if (!runs)
        {
            pool.Prefixes?.Match(Prefix, CollectionsMarshal.AsSpan(Tokens));
        }

        return Snapshot(
            runs ? Computed : Prefix.Count * DeviceKvCache.TokensPerBlock, runs ? Blocks.Count : Prefix.Count,
            runs ? Blocks.SharedOf(pool.Blocks) : pool.Prefixes?.HeldOf(Prefix) ?? 0);
    }

    private SequenceSnapshot Snapshot(int computed, int blocks, int shared) => new()
    {
        Id = Id,
        Phase = Phase,
        TokensTotal = Tokens.Count,
        TokensComputed = computed,
        TokensMax = TokensMax,
        BlocksHeld = blocks,
        BlocksShared = shared,
        Priority = Priority,
        ArrivalTime = ArrivalTime,
        FirstTokenTime = FirstTokenTime,
        TokensGenerated = Generated,
        TpotTarget = Slo.TimePerOutputToken,
        TtftTarget = Slo.TimeToFirstToken,
        InterTokenTarget = Slo.InterTokenLatency,
        LastTokenTime = LastTokenTime,
        Tenant = Tenant.Slot,
        ServiceDue = ServiceDue,
    };
}
