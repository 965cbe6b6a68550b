namespace FlexLLM.Scheduling;

/// <summary>
/// Decides what one step computes (paper.md e.1): inference first, then as much finetuning as the latency targets leave
/// room for. A function of its arguments alone: no field, clock, lock or tensor.
/// </summary>
internal static class HybridTokenScheduler
{
    /// <summary>Plans one step. The inference part does not depend on the jobs.</summary>
    public static StepPlan Plan(EngineSnapshot now, StepLimits limits, in LatencyModel latency)
    {
        InferencePlan inference = InferencePolicy.Fill(now, limits, latency);
        TimeSpan budget = FinetunePolicy.BudgetOf(now, inference, limits, latency);
        FinetunePlan finetuning = FinetunePolicy.Fill(now, inference.Features, budget, limits, latency);
        return new StepPlan
        {
            Preemptions = inference.Preemptions,
            Admissions = inference.Admissions,
            Inference = inference.Work,
            Forward = finetuning.Forward,
            Backward = finetuning.Backward,
            Features = finetuning.Features,
            LatencyPredicted = latency.Predict(finetuning.Features),
            Budget = budget,
        };
    }
}
