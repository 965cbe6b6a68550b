using FlexLLM.Scheduling;

namespace FlexLLM.Engine;

/// <summary>What requests have needed of their own slack, and what finetuning took of it.</summary>
internal sealed partial class EngineLoop
{
    private const double WildMax = 2.0;

    private SlackReserve _reserve = SlackReserve.Initial;
    private TimeSpan _finetuningTime;

    private void MarkFirst(InferenceSequence sequence, TimeSpan now)
    {
        if (sequence.FirstTokenTime is null)
        {
            (sequence.FirstTokenTime, sequence.FinetuningBefore) = (now, _finetuningTime);
        }
    }

    // A step that takes longer than expected takes from requests what they saved, whatever the cause; one wild step tells little.
    private void ObserveSlack(EngineSnapshot before, StepFeatures done, TimeSpan elapsed)
    {
        TimeSpan expected = Latency.Expect(done);
        double own = expected > TimeSpan.Zero ? Latency.Expect(done.WithoutFinetuning()) / expected : 1.0;
        _finetuningTime += elapsed * (1.0 - own);
        _reserve = _reserve.Passed(elapsed, before.Sequences.IsEmpty);
        if (before.Sequences.Any(s => s.IsDecoding))
        {
            TimeSpan most = Latency.Predict(done) * WildMax;
            _reserve = _reserve.Observe((elapsed < most ? elapsed : most) * own, Now);
        }
    }

    // Where nobody finetunes there is nothing to learn from answers in time, nor from those that had twice the time they took: with
    // targets so lax, as of batch requests, they would have been in time without a reserve, and outvote those that need it.
    private void ObserveEnd(InferenceSequence sequence)
    {
        if (sequence.LastTokenTime - sequence.FirstTokenTime is TimeSpan took && sequence.Generated > 1)
        {
            TimeSpan target = sequence.Slo.TimePerOutputToken * (sequence.Generated - 1);
            TimeSpan finetuning = _finetuningTime - sequence.FinetuningBefore;
            bool tells = took > target / 2 && (Jobs.HasWork || finetuning > TimeSpan.Zero);
            _reserve = tells ? _reserve.Ended(took - target, finetuning) : _reserve;
        }
    }
}
