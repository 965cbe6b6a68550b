using System.Diagnostics;

namespace FlexLLM.Scheduling;

/// <summary>
/// Decides what one step computes (paper.md e.1): inference first, then as much finetuning as the latency targets leave
/// room for. A function of its arguments alone: no field, clock, lock or tensor.
/// </summary>
internal static class HybridTokenScheduler
{
    /// <summary>Plans one step by the limits' sharing policy. Under co-serving the inference part does not depend on the jobs.</summary>
    /// <param name="now">What there is.</param>
    /// <param name="limits">Bounds of the step.</param>
    /// <param name="latency">What work costs.</param>
    /// <param name="scratch">Buffers to use again; they save allocations and change nothing else.</param>
    public static StepPlan Plan(
        EngineSnapshot now, StepLimits limits, in LatencyModel latency, PlannerScratch? scratch = null)
    {
        scratch ??= new PlannerScratch();
        return limits.Sharing.Mode switch
        {
            SharingMode.CoServing => CoServe(now, limits, latency, scratch),
            SharingMode.InferenceOnly => Infer(now, limits, latency, scratch),
            SharingMode.Temporal or SharingMode.DynamicTemporal => TemporalPolicy.Plan(now, limits, latency, scratch),
            SharingMode.FixedBudget => FixedBudgetPolicy.Plan(now, limits, latency, scratch),
            _ => throw new UnreachableException(),
        };
    }

    /// <summary>Requests alone.</summary>
    public static StepPlan Infer(EngineSnapshot now, StepLimits limits, in LatencyModel latency, PlannerScratch scratch) =>
        CoServe(now with { Jobs = [] }, limits, latency, scratch);

    private static StepPlan CoServe(EngineSnapshot now, StepLimits limits, in LatencyModel latency, PlannerScratch scratch)
    {
        scratch.Reset(now);
        InferencePlan inference = InferencePolicy.Fill(now, limits, latency, scratch);
        FinetuneBudget budget = FinetunePolicy.BudgetOf(now, inference, limits, latency);
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
            Budget = budget.Most,
        };
    }
}
