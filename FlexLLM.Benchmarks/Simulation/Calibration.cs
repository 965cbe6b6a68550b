using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>One figure of the authors beside ours.</summary>
internal readonly record struct CalibrationRow(string Figure, double Theirs, double Ours)
{
    public double Ratio => Ours / Theirs;
}

/// <summary>
/// Finds what the authors' system made of its machine, from what they published about it (paper.md e.4, g.5, g.6, g.7). Two
/// numbers a model, the share of the tensor peak and the overhead of a step, are fitted to eleven figures or so; three
/// more are the same for all:
/// <list type="bullet">
/// <item>the mean sample has 3,600 tokens, read from iterations with one sample each (g.7);</item>
/// <item>one layer goes backward a step. For 8B the artifact documents two; with two, and samples of 3,600 tokens, a step would train
/// 116 tokens, and the 2,352 tokens/s of g.5 in steps of 32.6 ms are 77, which one layer gives;</item>
/// <item>arithmetic and memory traffic add up. The slower of both, as a roofline has it, leaves vLLM's steps of few and of 256
/// rows (13.0 and 38.5 ms) too short, or the memory's rate below half of its peak.</item>
/// </list>
/// What one machine cannot match: inference alone, which the authors report of vLLM alone. It adds 3.5 ms to a step of 8B where their
/// own system adds 8, and has slower products, so that it has a fit of its own.
/// Their figures are held against the load that they served (<see cref="ServedRate"/>).
/// </summary>
internal static class Calibration
{
    /// <summary>Layers that the authors' scheduler took backward in a step.</summary>
    public const int BackwardLayers = 1;

    /// <summary>Rows of a batch in all their experiments.</summary>
    public const int TokensPerBatch = 256;

    /// <summary>How far a figure may be from the authors'.</summary>
    public const double ErrorMax = 0.10;

    private static readonly SimulatedWorkload Means = new() { RequestsPerSecond = 1 };

    // Second moment over squared mean of the samples' lengths (log-normal of deviation 0.5, cut at 8,192): attention is quadratic.
    private const double SampleSpread = 1.2;

    // Positions that a decoding request attends on average; a long answer is seen for longer.
    private static double ContextMean => Means.PromptMean + (0.5 * Means.AnswerMean * Math.Exp(0.9 * 0.9) * 0.9);

    /// <summary>
    /// Requests a second that the authors' system answered on one pipeline: their generated tokens over the tokens of an answer. It is what
    /// they sent for 8B, but of 3, 4 and 5 requests a second 2.3 to 2.4, 3.4 to 3.7 and 4.5 to 4.9 for 14B and 32B.
    /// </summary>
    /// <param name="paper">Their figures.</param>
    /// <param name="index">Which of the rates of <see cref="PaperFigures.PipelineRates"/>.</param>
    public static double ServedRate(PaperFigures paper, int index) => paper.Generated[index] / Means.AnswerMean;

    /// <summary>Names a load of the authors' policy: what was sent, and what was answered.</summary>
    public static string Load(PaperFigures paper, int index) => FormattableString.Invariant(
        $"fixed budget, {PaperFigures.PipelineRates[index]} req/s, {ServedRate(paper, index):F2} served");

    /// <summary>The authors' policy in the mean: a batch of 256 rows in forward steps, requests alone in backward steps.</summary>
    /// <param name="model">Model and machine.</param>
    /// <param name="rate">Arrivals a second on the pipeline.</param>
    public static (double TpotSeconds, double TrainedPerSecond) FixedBudget(SimulatedModel model, double rate)
    {
        StepCosts costs = StepCosts.Of(model);
        double sample = Means.SampleMean;
        double samplePairs = sample * sample * SampleSpread / 2;
        double backward = BackwardLayers * Item(costs, sample);
        double step = 0.04;
        double trained = 0;
        for (int i = 0; i < 40; i++) // Requests in flight are those that arrive within an answer, which takes steps.
        {
            BatchWork requests = Requests(rate, step);
            double window = Math.Max(1, TokensPerBatch - requests.Rows);
            double forwardSteps = sample / window;
            double backwardSteps = (double)model.Config.LayerCount / BackwardLayers;
            double forward = costs.Batch(requests with
            {
                Rows = requests.Rows + window,
                WindowRows = window,
                Positions = requests.Positions + (sample / 2),
                Context = requests.Context + (samplePairs / forwardSteps),
            });
            double steps = forwardSteps + backwardSteps;
            double mean = ((forwardSteps * forward) + (backwardSteps * (costs.Batch(requests) + backward))) / steps;
            step = (step + mean) / 2;
            trained = sample / (steps * step);
        }

        return (step, trained);
    }

    /// <summary>Mean time of a step with inference alone.</summary>
    public static double InferenceOnly(SimulatedModel model, double rate)
    {
        StepCosts costs = StepCosts.Of(model);
        double step = 0.02;
        for (int i = 0; i < 40; i++)
        {
            step = (step + costs.Batch(Requests(rate, step))) / 2;
        }

        return step;
    }

    /// <summary>Generated tokens a second of a replica whose batches are full with requests.</summary>
    public static double Saturated(SimulatedModel model)
    {
        double decodes = TokensPerBatch * Means.AnswerMean / (Means.AnswerMean + Means.PromptMean);
        double rateTimesStep = decodes / Means.AnswerMean;
        return decodes / StepCosts.Of(model).Batch(Requests(rateTimesStep, 1));
    }

    /// <summary>An iteration with a whole sample forward and backward beside 20 decoding requests, in seconds.</summary>
    public static double WholeSample(SimulatedModel model)
    {
        StepCosts costs = StepCosts.Of(model);
        double sample = Means.SampleMean;
        double pairs = sample * sample * SampleSpread / 2;
        double requests = costs.Batch(new BatchWork(20, 20, 0, 20 * ContextMean, 20 * ContextMean));
        return requests + costs.Batch(new BatchWork(sample, 0, sample, sample, pairs)) + (model.Config.LayerCount * Item(costs, sample));
    }

    /// <summary>The authors' figures of one model beside what the closed form says.</summary>
    public static IReadOnlyList<CalibrationRow> Rows(SimulatedModel model)
    {
        PaperFigures paper = PaperFigures.Of(model.Name);
        var rows = new List<CalibrationRow>();
        for (int i = 0; i < PaperFigures.PipelineRates.Count; i++)
        {
            (double tpot, double trained) = FixedBudget(model, ServedRate(paper, i));
            rows.AddRange(RowsOf(paper, i, tpot, trained));
        }

        rows.Add(new CalibrationRow("a sample an iteration: ms", paper.WholeSample.Ms, WholeSample(model) * 1e3));
        return rows;
    }

    /// <summary>The authors' figures at one of their rates, as far as they are known, beside ours.</summary>
    public static IEnumerable<CalibrationRow> RowsOf(PaperFigures paper, int index, double tpotSeconds, double trained)
    {
        if (!double.IsNaN(paper.TpotMs[index]))
        {
            yield return new CalibrationRow($"{Load(paper, index)}: TPOT ms", paper.TpotMs[index], tpotSeconds * 1e3);
        }

        yield return new CalibrationRow($"{Load(paper, index)}: finetuning tok/s", paper.Trained[index], trained);
    }

    /// <summary>The same of inference alone, by the other system on the same device.</summary>
    public static IReadOnlyList<CalibrationRow> ServerRows(SimulatedModel model)
    {
        PaperFigures paper = PaperFigures.Of(model.Name);
        return
        [
            .. paper.ServerTpotMs.Select((ms, i) => new CalibrationRow(
                $"vLLM alone, {2 * (i + 1)} req/s: TPOT ms", ms, InferenceOnly(model.AsServer(), 2 * (i + 1)) * 1e3)),
            new CalibrationRow("vLLM alone, saturated: generated tok/s", paper.ServerSaturated, Saturated(model.AsServer())),
        ];
    }

    /// <summary>The authors' measured latency function of 70B beside ours, in ms.</summary>
    public static IReadOnlyList<CalibrationRow> ProfileRows(SimulatedModel model)
    {
        const int Decodes = 8;
        StepCosts costs = StepCosts.Of(model);
        double context = Decodes * ContextMean;
        var requests = new BatchWork(Decodes, Decodes, 0, context, context);
        return
        [
            .. PaperFigures.ForwardProfile.Select(p => new CalibrationRow(
                $"8 decodes, {p.Tokens} tokens forward: ms", p.Ms, 1e3 * costs.Batch(requests with
                {
                    Rows = Decodes + p.Tokens,
                    WindowRows = p.Tokens,
                    Positions = context + p.Tokens,
                    Context = context + (p.Tokens * p.Tokens / 2.0),
                }))),
            .. PaperFigures.BackwardProfile.Select(p => new CalibrationRow(
                $"8 decodes, {p.Layers} layers of 1,024 tokens backward: ms", p.Ms,
                1e3 * (costs.Batch(requests) + (p.Layers * costs.Item(0, 1024))))),
        ];
    }

    /// <summary>The largest distance of any row from the authors' figure, as a share of it.</summary>
    public static double Error(IEnumerable<CalibrationRow> rows) => rows.Max(r => Math.Abs(r.Ratio - 1));

    /// <summary>The fit of the least error on a grid: shares in hundredths, overhead in half milliseconds.</summary>
    public static MachineFit Fit(SimulatedModel model)
    {
        (MachineFit? best, double error) = (null, double.MaxValue);
        for (int share = 50; share <= 84; share += 2)
        {
            for (double ms = 1; ms <= 45; ms += 0.5)
            {
                MachineFit fit = model.Fit with { TensorShare = share / 100.0, SecondsPerBatch = ms * 1e-3 };
                double its = Error(Rows(model with { Fit = fit }));
                (best, error) = its < error ? (fit, its) : (best, error);
            }
        }

        Check.That(best is not null);
        return best;
    }

    // Rows of the requests in flight, when each of their tokens takes a step.
    private static BatchWork Requests(double rate, double step)
    {
        double decodes = rate * Means.AnswerMean * step;
        double prompt = rate * Means.PromptMean * step;
        double context = decodes * ContextMean;
        return new BatchWork(
            decodes + prompt, decodes + (prompt / Means.PromptMean), 0, context + prompt, context + (prompt * Means.PromptMean / 2));
    }

    // One item, its attention that of samples of many lengths.
    private static double Item(StepCosts costs, double sample) => costs.Item(sample * (SampleSpread - 1) / 2, sample);
}
