using FlexLLM.Scheduling;

namespace FlexLLM.Engine;

/// <summary>What requests have needed of their own slack, and what finetuning took of it.</summary>
internal sealed partial class EngineLoop
{
    private SlackReserve _reserve = SlackReserve.Initial;
    private TimeSpan _finetuningTime;

    private void MarkFirst(InferenceSequence sequence, TimeSpan now)
    {
        if (sequence.FirstTokenTime is null)
        {
            (sequence.FirstTokenTime, sequence.FinetuningBefore) = (now, _finetuningTime);
        }
    }

    // A step that takes longer than expected counts as requests' own: whatever the cause, it takes from them what they saved.
    private void ObserveSlack(EngineSnapshot before, StepFeatures done, TimeSpan elapsed)
    {
        TimeSpan finetuning = Latency.Expect(done) - Latency.Expect(done.WithoutFinetuning());
        _finetuningTime += finetuning;
        TimeSpan? tightest = null;
        foreach (ref readonly SequenceSnapshot s in before.Sequences.AsSpan())
        {
            tightest = s.IsDecoding && !(tightest <= s.TpotTarget) ? s.TpotTarget : tightest;
        }

        if (tightest is TimeSpan target)
        {
            _reserve = _reserve.Observe(elapsed - finetuning - target, Now);
        }
    }

    private void ObserveEnd(InferenceSequence sequence)
    {
        if (sequence.LastTokenTime - sequence.FirstTokenTime is TimeSpan took && sequence.Generated > 1)
        {
            TimeSpan late = took - (sequence.Slo.TimePerOutputToken * (sequence.Generated - 1));
            _reserve = _reserve.Ended(late, _finetuningTime - sequence.FinetuningBefore);
        }
    }
}
