namespace FlexLLM.Scheduling;

/// <summary>
/// Decides what one step computes (paper.md e.1): inference first, then as much finetuning as the latency targets leave
/// room for. A function of its arguments alone: no field, clock, lock or tensor.
/// </summary>
internal static class HybridTokenScheduler
{
    /// <summary>Plans one step. The inference part does not depend on the jobs.</summary>
    /// <param name="now">What there is.</param>
    /// <param name="limits">Bounds of the step.</param>
    /// <param name="latency">What work costs.</param>
    /// <param name="scratch">Buffers to use again; they save allocations and change nothing else.</param>
    public static StepPlan Plan(
        EngineSnapshot now, StepLimits limits, in LatencyModel latency, PlannerScratch? scratch = null)
    {
        scratch ??= new PlannerScratch();
        scratch.Reset(now);
        InferencePlan inference = InferencePolicy.Fill(now, limits, latency, scratch);
        TimeSpan budget = FinetunePolicy.BudgetOf(now, inference, limits, latency);
        FinetunePlan finetuning = FinetunePolicy.Fill(now, inference.Features, budget, limits, latency, scratch);
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
