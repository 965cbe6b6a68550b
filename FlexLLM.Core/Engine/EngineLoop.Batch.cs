using System.Runtime.InteropServices;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Engine;

/// <summary>One batch of a step: its rows, what becomes of the logits, and requests that end with it.</summary>
internal sealed partial class EngineLoop
{
    // False where it was given up for a request.
    private bool TryRunBatch(StepPlan plan, long begun, bool mayGiveUp)
    {
        _batch.Clear();
        _chooser.Clear();
        foreach (InferenceWork work in plan.Inference)
        {
            InferenceSequence sequence = _sequences[work.Id.Value];
            int end = work.ContextLength + work.Tokens;
            Check.That(sequence.Computed == work.ContextLength && end <= sequence.Tokens.Count);
            Check.That(sequence.Blocks.EnsureCapacity(end, _blocks), "the plan admits only what the pool holds");
            bool isSampled = end == sequence.Tokens.Count;
            _batch.AddInference(
                CollectionsMarshal.AsSpan(sequence.Tokens).Slice(work.ContextLength, work.Tokens), work.ContextLength, _pool.Cache,
                sequence.Blocks.Blocks, sequence.Adapter?.Weights, sampled: isSampled ? 1 : 0);
            if (isSampled)
            {
                _chooser.Expect(sequence.Sampling);
            }
        }

        foreach (ForwardWindow window in plan.Forward)
        {
            Jobs.AddWindow(window, _batch);
        }

        if (_batch.Rows == 0)
        {
            return true;
        }

        Func<bool>? isGivenUp = null;
        if (mayGiveUp)
        {
            TimeSpan half = Latency.Expect(plan.Features.WithoutBackward()) / 2.0;
            isGivenUp = () => _inbox.HasRequests && _clock.GetElapsedTime(begun) < half;
        }

        if (_forward.Run(_batch, isGivenUp) is not TensorSlice logits)
        {
            return false;
        }

        // A device may run ahead: what fails on it is to fail before anybody counts its rows as done.
        _chooser.Read(logits);
        _model.Backend.Synchronize();
        int sampled = 0;
        foreach (InferenceWork work in plan.Inference)
        {
            InferenceSequence sequence = _sequences[work.Id.Value];
            sequence.Advance(work.Tokens, _pool);
            if (sequence.Computed == sequence.Tokens.Count)
            {
                Commit(sequence, _chooser.Choose(sampled++, sequence.Sampling, sequence.History));
            }
        }

        foreach (ForwardWindow window in plan.Forward)
        {
            Jobs.CompleteWindow(window);
        }

        return true;
    }

    // Appends the token, delivers what became text, and ends the sequence where it must end.
    private void Commit(InferenceSequence sequence, SampledToken token)
    {
        TimeSpan now = Now;
        if (token.Fault != SamplingFault.None)
        {
            string detail = token.Fault == SamplingFault.NotFinite
                ? "The model's logits are not finite."
                : "The request's logit bias forbids every token.";
            Finish(sequence, GeneratedToken.Failed(detail));
            return;
        }

        TenantTable.Generated(sequence.Tenant);
        sequence.Tokens.Add(token.TokenId);
        sequence.History.AddGenerated(token.TokenId);
        Counters.Observe(sequence, now);
        MarkFirst(sequence, now);
        sequence.LastTokenTime = now;

        bool eos = !sequence.IgnoreEos && _eos.Contains(token.TokenId);

        // The end of the sequence has no text, nor has a row of the head that pads the vocabulary.
        bool hasText = !eos && _tokenizer is not null && _tokenizer.Contains(token.TokenId);
        string text = hasText ? sequence.Stops.Append(sequence.Decoder!.Append(token.TokenId)) : string.Empty;
        bool full = sequence.Tokens.Count >= sequence.TokensMax;
        FinishReason? reason = eos || sequence.Stops.Stopped ? FinishReason.Stop : full ? FinishReason.Length : null;
        if (reason is not null && !sequence.Stops.Stopped)
        {
            text += sequence.Stops.Append(sequence.Decoder?.Flush() ?? string.Empty);
            text += sequence.Stops.Stopped ? string.Empty : sequence.Stops.Flush();
        }

        var item = new GeneratedToken
        {
            TokenId = token.TokenId,
            Text = text,
            LogProb = token.LogProb,
            TopLogProbs = token.Alternatives ?? [],
            FinishReason = reason,
        };
        if (reason is null)
        {
            sequence.Deliver(item);
        }
        else
        {
            Finish(sequence, item);
        }
    }

    private void Finish(InferenceSequence sequence, GeneratedToken last)
    {
        Remove(sequence);
        ObserveEnd(sequence);
        sequence.Deliver(last);
        sequence.CloseStream();
        Counters.Finish(sequence, last.FinishReason!.Value, Now);
    }

    private void Remove(InferenceSequence sequence)
    {
        _sequences.Remove(sequence.Id.Value);
        _tenants.Leave(sequence.Tenant, sequence.Phase == SequencePhase.Waiting);
        sequence.Blocks.Release(_blocks);
        sequence.Adapter?.Release();
        sequence.End();
    }
}
