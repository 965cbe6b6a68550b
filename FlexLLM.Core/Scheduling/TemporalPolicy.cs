using System.Collections.Immutable;
using FlexLLM.Primitives;

namespace FlexLLM.Scheduling;

/// <summary>
/// Temporal sharing (paper.md e.3): steps of inference alone, then one sample of one job forward and backward while requests stand
/// still. It is there to be compared with.
/// </summary>
internal static class TemporalPolicy
{
    /// <summary>Budget of a step that no latency target bounds.</summary>
    public static readonly TimeSpan Unbounded = TimeSpan.FromHours(1);

    /// <summary>Plans a step of the turn that it is.</summary>
    public static StepPlan Plan(EngineSnapshot now, StepLimits limits, in LatencyModel latency, PlannerScratch scratch)
    {
        if (Turn(now, limits, latency) is JobSnapshot job)
        {
            return Train(job, limits, latency);
        }

        return HybridTokenScheduler.Infer(now, limits, latency, scratch);
    }

    /// <summary>The job whose turn it is; null where it is inference's. A sample that has begun keeps its turn to its end.</summary>
    private static JobSnapshot? Turn(EngineSnapshot now, StepLimits limits, LatencyModel latency)
    {
        JobSnapshot? next = null;
        foreach (JobSnapshot job in now.Jobs)
        {
            if (job.Phase != JobPhase.Blocked && (next is not JobSnapshot best || Comes(job, best)))
            {
                next = job;
            }
        }

        if (next is not JobSnapshot first || HasBegun(first))
        {
            return next;
        }

        bool isDue = now.Sequences.IsEmpty || now.StepsSinceFinetuning >= limits.Sharing.StepsBetween;
        bool isFree = limits.Sharing.Mode == SharingMode.DynamicTemporal && CanWait(now, TimeOf(first, limits, latency), latency);
        return isDue || isFree ? first : null;

        static bool Comes(in JobSnapshot job, in JobSnapshot other) =>
            HasBegun(job) == HasBegun(other) ? job.GoesBefore(other) : HasBegun(job);

        static bool HasBegun(in JobSnapshot job) => job.Phase == JobPhase.Backward || job.PositionsDone > 0;
    }

    /// <summary>The next piece of the sample, as large as a step can be.</summary>
    private static StepPlan Train(JobSnapshot job, StepLimits limits, LatencyModel latency)
    {
        ImmutableArray<ForwardWindow> forward = [];
        ImmutableArray<BackwardWindow> backward = [];
        StepFeatures features = default;
        if (job.Phase == JobPhase.Forward)
        {
            int tokens = Math.Min(job.ForwardTokensLeft, limits.TokensPerStepMax);
            forward = [new ForwardWindow(job.Id, tokens)];
            features = features.WithForward(job.PositionsDone, tokens);
        }
        else
        {
            backward = WholeLayers(job, 1, limits, ref features);
        }

        return new StepPlan
        {
            Preemptions = [],
            Admissions = [],
            Inference = [],
            Forward = forward,
            Backward = backward,
            Features = features,
            LatencyPredicted = latency.Predict(features),
            Budget = Unbounded,
        };
    }

    /// <summary>What is left of the layer in progress and the layers below it, so many in all, in items of the largest size.</summary>
    public static ImmutableArray<BackwardWindow> WholeLayers(JobSnapshot job, int layers, StepLimits limits, ref StepFeatures features)
    {
        Check.That(job.RowsLeft > 0);
        var windows = ImmutableArray.CreateBuilder<BackwardWindow>();
        int rowsLeft = job.RowsLeft;
        int lowest = Math.Max(job.LowestLayer, job.Layer - layers + 1);
        for (int layer = job.Layer; layer >= lowest; layer--, rowsLeft = job.SampleTokens)
        {
            while (rowsLeft > 0)
            {
                int rows = Math.Min(rowsLeft, limits.BackwardRowsMax);
                rowsLeft -= rows;
                windows.Add(new BackwardWindow(job.Id, layer, rowsLeft, rows));
                features = features.WithBackward(rowsLeft, rows);
            }
        }

        return windows.ToImmutable();
    }

    /// <summary>How long the job's sample takes from its start.</summary>
    private static TimeSpan TimeOf(JobSnapshot job, StepLimits limits, LatencyModel latency)
    {
        TimeSpan time = TimeSpan.Zero;
        for (int start = 0; start < job.SampleTokens; start += limits.TokensPerStepMax)
        {
            int tokens = Math.Min(job.SampleTokens - start, limits.TokensPerStepMax);
            time += latency.Predict(default(StepFeatures).WithForward(start, tokens));
        }

        StepFeatures layer = default;
        WholeLayers(job with { Layer = job.LowestLayer, RowsLeft = job.SampleTokens }, 1, limits, ref layer);
        return time + (latency.Predict(layer) * (job.LayersAbove + 1));
    }

    /// <summary>Whether every request would still meet its target when its next token came a step after such a pause.</summary>
    private static bool CanWait(EngineSnapshot now, TimeSpan pause, LatencyModel latency)
    {
        foreach (SequenceSnapshot s in now.Sequences)
        {
            TimeSpan own = latency.Predict(default(StepFeatures).WithInference(s.TokensComputed, s.TokensLeft));
            TimeSpan slack = s.TpotSlack(now.Now) ?? (s.ArrivalTime + s.TtftTarget - now.Now);
            if (slack < pause + own)
            {
                return false;
            }
        }

        return true;
    }
}
