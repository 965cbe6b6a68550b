using FlexLLM.Benchmarks.Serving;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>What `simulate --calibrate` prints: the authors' figures beside those of the calibrated machines.</summary>
internal static class CalibrationReport
{
    public static void Print(TextWriter output, IReadOnlyList<SimulatedModel> models, double seconds, ulong seed)
    {
        output.WriteLine("Shares and overheads are fitted in closed form, then checked on the simulated engine.");
        foreach (SimulatedModel model in models)
        {
            MachineFit best = Calibration.Fit(model);
            output.WriteLine();
            output.WriteLine(
                $"{model.Title} on {model.Ranks} x {model.Gpu.Name}: {Describe(model.Fit)} (least error on the grid: {Describe(best)})");
            Print(output, "closed form", Calibration.Rows(model));
            Print(output, $"closed form, vLLM: {Describe(model.AsServer().Fit)}", Calibration.ServerRows(model));
            Print(output, $"simulated engine, {seconds:F0} s a rate", SimulatedRows(model, seconds, seed));
        }

        SimulatedModel profiled = SimulatedModel.Profiled;
        output.WriteLine();
        output.WriteLine($"{profiled.Title}: {Describe(profiled.Fit)}");
        Print(output, "closed form", Calibration.ProfileRows(profiled));
    }

    /// <summary>The authors' policy on the simulated engine, one pipeline, at the loads that they served.</summary>
    public static IReadOnlyList<CalibrationRow> SimulatedRows(SimulatedModel model, double seconds, ulong seed, params double[] rates)
    {
        PaperFigures paper = PaperFigures.Of(model.Name);
        var rows = new List<CalibrationRow>();
        var setting = new SimulationSetting { Model = model, Seconds = seconds, Seed = seed };
        foreach ((int i, double rate) in PaperFigures.PipelineRates.Index())
        {
            if (rates.Length > 0 && !rates.Contains(rate))
            {
                continue;
            }

            ServingRun run = ModeRunner.Run(
                setting, ModeRunner.FixedBudget, Calibration.ServedRate(paper, i) * PaperFigures.Pipelines);
            double tpot = run.Requests.Average(r => r.Tpot) ?? double.NaN;
            rows.AddRange(Calibration.RowsOf(paper, i, tpot, run.TrainedPerSecond / PaperFigures.Pipelines));
            rows.Add(new CalibrationRow(
                $"{Calibration.Load(paper, i)}: generated tok/s", paper.Generated[i], run.GeneratedPerSecond / PaperFigures.Pipelines));
        }

        return rows;
    }

    private static void Print(TextWriter output, string title, IReadOnlyList<CalibrationRow> rows)
    {
        output.WriteLine($"  {title,-56}{"paper",10}{"ours",10}{"ratio",8}");
        foreach (CalibrationRow row in rows)
        {
            output.WriteLine(FormattableString.Invariant($"    {row.Figure,-54}{row.Theirs,10:F1}{row.Ours,10:F1}{row.Ratio,8:F3}"));
        }

        string error = (100 * Calibration.Error(rows)).Fixed(1);
        output.WriteLine($"    {"largest distance, %",-54}{error,28}");
    }

    private static string Describe(MachineFit fit) => FormattableString.Invariant(
        $"{100 * fit.TensorShare:F0} % of the tensor peak, {100 * fit.BandwidthShare:F0} % of the bandwidth, ") +
        FormattableString.Invariant($"{1e3 * fit.SecondsPerBatch:F1} ms a step, {1e3 * fit.SecondsPerItem:F1} ms a layer backward");
}
