using FlexLLM.Benchmarks.Serving;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>Tables of simulated runs, each mode with the paper's figures below it, and the report that goes to JSON and HTML.</summary>
internal static class SimulationReport
{
    private const int NameWidth = 26;
    private const int CellWidth = 9;

    /// <summary>Three tables: attainment, generated tokens, finetuning tokens, at every rate.</summary>
    public static void Print(TextWriter output, SimulatedModel model, IReadOnlyList<ServingRun> runs)
    {
        double[] rates = [.. runs.Select(r => r.RequestsPerSecond).Distinct().Order()];
        string[] modes = [.. runs.Select(r => r.Mode).Distinct()];
        PaperFigures paper = PaperFigures.Of(model.Name);
        output.WriteLine();
        output.WriteLine(
            $"{model.Title}: {PaperFigures.Pipelines} pipelines on {model.Ranks} x {model.Gpu.Name} each, " +
            $"TPOT {model.TpotTarget * 1e3:F0} ms, TTFT 5 s");
        PrintTable(
            "SLO attainment, %", r => 100 * AttainmentOf(r), "F1", keeps: false, (mode, rate) => At(paper.Attainment, mode, rate));
        if (model.Name == "8b")
        {
            PrintTable(
                "attained at 45 ms, %", r => 100 * AttainmentOf(r with { TpotTarget = 0.045 }), "F1", keeps: false,
                (_, _) => double.NaN); // The TPOT of the authors' scripts (g.3).
        }

        PrintTable(
            "mean TPOT, ms", r => 1e3 * (r.Requests.Average(q => q.Tpot) ?? double.NaN), "F1", keeps: false, (mode, rate) =>
            mode == ModeRunner.FixedBudget ? AtRate(paper.TpotMs, rate) : double.NaN);
        PrintTable("inference, generated tokens/s", r => r.GeneratedPerSecond, "F0", keeps: false, (mode, rate) =>
            rate == 20 && paper.GeneratedAtPeak.Any(p => p.Mode == mode)
                ? paper.GeneratedAtPeak.First(p => p.Mode == mode).Rate
                : mode == ModeRunner.FixedBudget ? PaperFigures.Pipelines * AtRate(paper.Generated, rate) : double.NaN);
        PrintTable("finetuning, tokens/s", r => r.TrainedPerSecond, "F0", keeps: true, (mode, rate) => At(paper.Finetuning, mode, rate));

        void PrintTable(string title, Func<ServingRun, double> value, string format, bool keeps, Func<string, double, double> theirs)
        {
            output.WriteLine();
            string kept = keeps && rates.Length > 1 ? $"{"kept, %",CellWidth}" : string.Empty;
            output.WriteLine($"{title,-NameWidth}{string.Concat(rates.Select(r => Cell(r, "0.#")))}{kept}");
            foreach (string mode in modes)
            {
                double[] values = [.. rates.Select(r => runs.Where(x => x.Mode == mode && x.RequestsPerSecond == r)
                    .Select(value).DefaultIfEmpty(double.NaN).First())];
                PrintRow(mode, values);
                double[] others = [.. rates.Select(r => theirs(mode, r))];
                if (others.Any(v => !double.IsNaN(v)))
                {
                    PrintRow("  paper", others);
                }

                if (keeps && mode == "co-serving" && modes.Contains(ModeRunner.Oracle))
                {
                    // A latency model that errs leaves slack, or is late; the oracle's does neither.
                    output.WriteLine($"{"  % of the oracle",-NameWidth}{string.Concat(rates.Select((r, i) =>
                        Cell(100 * values[i] / value(runs.First(x => x.Mode == ModeRunner.Oracle && x.RequestsPerSecond == r)), "F1")))}");
                }
            }

            void PrintRow(string name, double[] values)
            {
                string cells = string.Concat(values.Select(v => Cell(v, format)));
                bool isKept = keeps && values.Length > 1 && values[0] > 0;
                output.WriteLine($"{name,-NameWidth}{cells}{(isKept ? Cell(100 * values[^1] / values[0], "F1") : string.Empty)}");
            }
        }
    }

    /// <summary>The report that can be saved.</summary>
    public static ServingReport Of(
        IReadOnlyList<(SimulatedModel Model, IReadOnlyList<ServingRun> Runs)> models,
        IReadOnlyList<(string Name, string Value)> settings) =>
        new()
        {
            Title = "Sharing modes, simulated at the paper's scale",
            Settings = settings,
            Machine = [("machine", $"{SimulatedGpu.A100.Name}, calibrated on the authors' figures; no GPU was used")],
            Sections =
            [
                .. models.Select(m => new ServingSection
                {
                    Title = $"{m.Model.Title}, {PaperFigures.Pipelines} pipelines",
                    Runs = m.Runs,
                    References = [.. References(m.Model, [.. m.Runs.Select(r => r.Mode).Distinct()])],
                    Notes =
                    [
                        "One pipeline is simulated and its tokens are multiplied by four, as the authors do.",
                        "A split machine's attainment is that of one of its serving pipelines.",
                    ],
                }),
            ],
        };

    private static IEnumerable<ServingReference> References(SimulatedModel model, string[] modes)
    {
        PaperFigures paper = PaperFigures.Of(model.Name);
        foreach ((string mode, double[] percent) in paper.Attainment.Where(a => modes.Contains(a.Mode)))
        {
            yield return new ServingReference($"{mode} (paper)", mode, ServingFigure.Attainment, Points(percent, 0.01));
        }

        foreach ((string mode, double[] rate) in paper.Finetuning.Where(a => modes.Contains(a.Mode)))
        {
            yield return new ServingReference($"{mode} (paper)", mode, ServingFigure.TrainedPerSecond, Points(rate, 1));
        }

        static (double, double)[] Points(double[] values, double unit) =>
        [
            .. values.Index().Where(v => !double.IsNaN(v.Item))
                .Select(v => (PaperFigures.Pipelines * PaperFigures.PipelineRates[v.Index], v.Item * unit)),
        ];
    }

    // A machine that only finetunes attains nothing, and misses nothing.
    private static double AttainmentOf(ServingRun run) => run.Requests.Count == 0 ? double.NaN : run.Attainment;

    private static double At((string Mode, double[] Values)[] table, string mode, double rate)
    {
        // Their co-serving is the fixed budget: both of ours compare with it.
        string theirs = mode is ModeRunner.FixedBudget ? "co-serving" : mode;
        int row = Array.FindIndex(table, t => t.Mode == theirs);
        return row < 0 ? double.NaN : AtRate(table[row].Values, rate);
    }

    private static double AtRate(double[] values, double rate)
    {
        int i = PaperFigures.PipelineRates.ToList().IndexOf(rate / PaperFigures.Pipelines);
        return i < 0 ? double.NaN : values[i];
    }

    private static string Cell(double value, string format) =>
        (double.IsNaN(value) ? "-" : value.ToString(format, System.Globalization.CultureInfo.InvariantCulture)).PadLeft(CellWidth);
}
