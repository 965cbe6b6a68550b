using System.Diagnostics;
using System.Runtime.ExceptionServices;
using FlexLLM.Benchmarks.Serving;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>
/// Runs simulations on all processors. They share nothing, so that neither order nor number of processors changes a figure.
/// </summary>
internal static class SimulatedRuns
{
    /// <summary>The outcome of every task, in the order of the tasks.</summary>
    /// <param name="tasks">What to run.</param>
    /// <param name="run">Runs one.</param>
    /// <param name="name">Names one, for the line of progress that it gets.</param>
    /// <param name="progress">Takes the lines, in the order in which runs end.</param>
    public static ServingRun[] All<T>(IReadOnlyList<T> tasks, Func<T, ServingRun> run, Func<T, string> name, TextWriter progress)
    {
        var runs = new ServingRun[tasks.Count];
        int done = 0;
        try
        {
            Parallel.For(0, tasks.Count, new ParallelOptions { MaxDegreeOfParallelism = Environment.ProcessorCount }, RunOne);
        }
        catch (AggregateException e)
        {
            ExceptionDispatchInfo.Throw(e.InnerExceptions[0]); // The cause itself; that runs are spread is nobody's concern.
        }

        return runs;

        void RunOne(int i)
        {
            var watch = Stopwatch.StartNew();
            runs[i] = run(tasks[i]);
            lock (progress)
            {
                progress.WriteLine(FormattableString.Invariant(
                    $"{++done}/{tasks.Count} {name(tasks[i])}: {runs[i].Steps} steps in {watch.Elapsed.TotalSeconds:F1} s, ") +
                    $"log {runs[i].EventHash}");
            }
        }
    }
}
