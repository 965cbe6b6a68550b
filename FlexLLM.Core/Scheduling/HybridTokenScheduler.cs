using System.Diagnostics;

namespace FlexLLM.Scheduling;

/// <summary>
/// Decides what one step computes (paper.md e.1): inference first, then as much finetuning as the latency targets leave
/// room for. A function of its arguments alone: no field, clock, lock or tensor.
/// </summary>
internal static class HybridTokenScheduler
{
    /// <summary>Plans one step by the limits' sharing policy. Under co-serving the inference part does not depend on the jobs.</summary>
    public static StepPlan Plan(EngineSnapshot now, StepLimits limits, in LatencyModel latency) => limits.Sharing.Mode switch
    {
        SharingMode.CoServing => CoServe(now, limits, latency),
        SharingMode.InferenceOnly => Infer(now, limits, latency),
        SharingMode.Temporal or SharingMode.DynamicTemporal => TemporalPolicy.Plan(now, limits, latency),
        SharingMode.FixedBudget => FixedBudgetPolicy.Plan(now, limits, latency),
        _ => throw new UnreachableException(),
    };

    /// <summary>Requests alone.</summary>
    public static StepPlan Infer(EngineSnapshot now, StepLimits limits, in LatencyModel latency) =>
        CoServe(now with { Jobs = [] }, limits, latency);

    private static StepPlan CoServe(EngineSnapshot now, StepLimits limits, in LatencyModel latency)
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
