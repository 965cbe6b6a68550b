using FlexLLM.Finetuning;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;
using static FlexLLM.Engine.StepTimer;

namespace FlexLLM.Engine;

/// <summary>Holds a latency model's predictions against random mixed steps that its profile never saw.</summary>
internal sealed class HeldOutSteps(StepTimer steps)
{
    /// <summary>Predicts and measures random mixed steps of requests beside one job.</summary>
    /// <param name="model">What predicts.</param>
    /// <param name="count">Steps.</param>
    /// <param name="seed">Of their sizes.</param>
    /// <param name="learns">Whether the model sees each step after predicting it, as an engine's does.</param>
    public LatencyErrorReport Measure(LatencyModel model, int count, ulong seed, bool learns)
    {
        var random = new SeededRandom(seed);
        var measured = new List<(TimeSpan Expected, TimeSpan Most, TimeSpan Took)>();
        TrainingRun? run = steps.TryStart(Math.Min(SampleTokensMax, steps.PositionsMax));
        try
        {
            while (measured.Count < count)
            {
                Inference[] inference = RandomInference(ref random);
                bool trains = run is not null && random.Next(10) < 7;
                if (!trains && inference.Length == 0)
                {
                    continue;
                }

                steps.Touch(inference);
                (int forward, int[] items) = trains ? RandomTraining(run!, inference.Sum(i => i.Rows), ref random) : (0, []);
                (StepFeatures features, TimeSpan took) = steps.Measure(inference, run, forward, items);
                measured.Add((model.Expect(features), model.Predict(features), took));
                model = learns ? model.Observe(features, took) : model;
            }
        }
        finally
        {
            steps.End(run);
        }

        return LatencyErrorReport.Of(measured);
    }

    private Inference[] RandomInference(ref SeededRandom random)
    {
        while (true)
        {
            var step = new List<Inference>();
            for (int i = random.Next(17); i > 0; i--)
            {
                step.Add(new Inference(random.Next(Math.Min(steps.PositionsMax, 1024)), 1, true));
            }

            if (random.Next(10) < 3)
            {
                int rows = random.Next(1, 1 + Math.Min(steps.PositionsMax, 192));
                step.Add(new Inference(random.Next(1 + Math.Min(steps.PositionsMax - rows, 512)), rows, random.Next(2) == 0));
            }

            if (steps.Fits([.. step]))
            {
                return [.. step];
            }
        }
    }

    private (int Forward, int[] Items) RandomTraining(TrainingRun run, int rowsTaken, ref SeededRandom random)
    {
        if (run.Cursor.Phase == TrainingPhase.Forward)
        {
            int left = run.Cursor.Sample.Ids.Length - run.Cursor.PositionsDone;
            int most = Math.Min(Math.Min(left, 160), steps.Limits.TokensPerStepMax - rowsTaken);
            return (most == 0 ? 0 : random.Next(1, most + 1), []);
        }

        var items = new List<int>();
        int rowsLeft = run.Cursor.RowsLeft;
        for (int i = random.Next(1, 5); i > 0 && rowsLeft > 0; i--)
        {
            items.Add(random.Next(1, 1 + Math.Min(rowsLeft, steps.Limits.BackwardRowsMax)));
            rowsLeft -= items[^1];
        }

        return (0, [.. items]);
    }
}
