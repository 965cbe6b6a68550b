using System.Globalization;
using FlexLLM.Finetuning;
using FlexLLM.Primitives;

namespace FlexLLM.Engine;

/// <summary>One job of a <see cref="JobTable"/>.</summary>
internal sealed class JobEntry(FinetuningRequest request, TrainingRun run, TimeSpan started, string parameters)
{
    public FinetuningRequest Request { get; } = request;

    public TrainingRun Run { get; } = run;

    public TimeSpan Started { get; } = started;

    /// <summary>What a checkpoint must share with the request that resumes it.</summary>
    public string Parameters { get; } = parameters;

    /// <summary>Tokens that an earlier run, before a resume, had done.</summary>
    public long TokensBefore { get; } = run.Cursor.TokensTotal * run.Cursor.Step / Math.Max(1, run.Cursor.Steps);

    /// <summary>Share of the slack relative to other jobs.</summary>
    public double Weight { get; } = WeightOf(request);

    public FinetuningJob? Handle { get; set; }

    public bool Paused { get; set; }

    /// <summary>Tokens of work it had, or was taken to have had when it joined the others.</summary>
    public double Served { get; set; }

    /// <summary>A level of priority multiplies the share: the lowest still gets its part, so none starves.</summary>
    public static double WeightOf(FinetuningRequest request) =>
        request.Weight * Math.Pow(FinetuningRequest.SharePerPriority, request.Priority);

    public FinetuningProgress ProgressAt(FinetuningStatus status, TimeSpan now)
    {
        double seconds = (now - Started).TotalSeconds;
        double speed = seconds > 0 ? Run.TokensDone / seconds : 0;
        long done = TokensBefore + Run.TokensDone;
        TimeSpan? remaining = speed > 0 ? TimeSpan.FromSeconds(Math.Max(0, Run.Cursor.TokensTotal - done) / speed) : null;
        return new FinetuningProgress(
            status, Run.Cursor.Step, Run.Cursor.Steps, Run.Cursor.EpochOfLastStep, Run.LastLoss, done, speed, remaining);
    }

    /// <summary>
    /// What must be equal for a resumed job to end with the same bits: the tokens and targets in their order, and how they are used.
    /// </summary>
    public static string ParametersOf(FinetuningRequest request, BuiltSamples samples)
    {
        var hash = new StableHash();
        foreach (TrainingSample sample in samples.Samples)
        {
            hash.Add(sample.Ids);
            hash.Add(sample.Targets);
        }

        return string.Create(
            CultureInfo.InvariantCulture,
            $"samples={samples.Samples.Count} data={hash.Value:x16} epochs={request.Epochs} accumulation={request.GradientAccumulation} " +
            $"shuffle={request.ShuffleSeed} {request.Optimizer.Describe()}{(request.SavesAsBF16 ? " saved=bf16" : string.Empty)}");
    }
}
