using System.Collections.Immutable;

namespace FlexLLM.Scheduling;

/// <summary>
/// The scheduler of the authors' released code (paper.md e.2), on this engine: no latency model, a constant number of tokens a step
/// and of layers backward, one job at a time, forward and backward never in the same step. It is there to be compared with.
/// </summary>
internal static class FixedBudgetPolicy
{
    // A machine on which everything is free: prompts fill the step whatever it costs the others.
    private static readonly LatencyModel Careless = new(default, Correction: 1.0, Tail: 1.0);

    public static StepPlan Plan(EngineSnapshot now, StepLimits limits, in LatencyModel latency, PlannerScratch scratch)
    {
        StepPlan inference = HybridTokenScheduler.Infer(now, limits, Careless, scratch);
        StepFeatures features = inference.Features;
        ImmutableArray<ForwardWindow> forward = [];
        ImmutableArray<BackwardWindow> backward = [];

        // The first in the queue runs to its end.
        JobSnapshot job = now.Jobs.Where(j => j.Phase != JobPhase.Blocked).OrderBy(j => j.Id.Value).FirstOrDefault();
        int rows = limits.TokensPerStepMax - features.InferenceRows;
        if (job.Phase == JobPhase.Forward && rows > 0)
        {
            int tokens = Math.Min(job.ForwardTokensLeft, rows);
            forward = [new ForwardWindow(job.Id, tokens)];
            features = features.WithForward(job.PositionsDone, tokens);
        }
        else if (job.Phase == JobPhase.Backward)
        {
            backward = TemporalPolicy.WholeLayers(job, limits.Sharing.BackwardLayers, limits, ref features);
        }

        return inference with
        {
            Forward = forward,
            Backward = backward,
            Features = features,
            LatencyPredicted = latency.Predict(features),
            Budget = TemporalPolicy.Unbounded,
        };
    }
}
