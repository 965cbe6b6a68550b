using FlexLLM.Finetuning;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Engine;

/// <summary>Backward items of jobs, and what fails in them.</summary>
internal sealed partial class JobTable
{
    /// <summary>
    /// Runs one backward item, and the optimizer where it completes a group. Of a job that has failed nothing is left to run.
    /// </summary>
    public void RunBackward(BackwardWindow window, TimeSpan now)
    {
        if (!_jobs.TryGetValue(window.Id.Value, out JobEntry? entry))
        {
            return;
        }

        try
        {
            RunBackward(window, entry, now);
        }
        catch (Exception e) when (e is FlexLlmException || model.Backend.IsOutOfMemory(e))
        {
            // Numbers that are none, or a device with less memory than its budget: the job's own bad luck, nobody else's.
            Fail(window.Id, now, e is FlexLlmException ? e : DeviceBudget.RanOut("in the job's backward pass", e));
        }
    }

    /// <summary>Ends a job for a reason that is nobody else's, and frees what it held. One that has ended is left as it is.</summary>
    public void Fail(JobId id, TimeSpan now, Exception cause)
    {
        if (_jobs.TryGetValue(id.Value, out JobEntry? entry))
        {
            End(id.Value, entry, FinetuningStatus.Failed, now, cause);
        }
    }

    private void RunBackward(BackwardWindow window, JobEntry entry, TimeSpan now)
    {
        TrainingRun run = entry.Run;
        Check.That(run.Cursor.Layer == window.Layer && run.Cursor.RowsLeft == window.RowStart + window.RowCount);

        // A layer of a window weighs its share of the sample's forward pass, so that both halves count alike between jobs.
        Serve(entry, (double)window.RowCount / model.Config.LayerCount);
        bool isGroupDone = run.RunBackward(backward, window.RowCount);
        if (isGroupDone)
        {
            run.Step();
        }

        // A device may run ahead: what fails on it is to fail here.
        model.Backend.Synchronize();
        if (!isGroupDone)
        {
            return;
        }

        if (!double.IsFinite(run.LastLoss))
        {
            throw new FlexLlmException(
                $"The loss of step {run.Cursor.Step} is {run.LastLoss}: the learning rate is too high, or the data overflow the model.");
        }

        if (run.Cursor.Phase == TrainingPhase.Done)
        {
            CompleteOrFail(window.Id.Value, entry, now);
            return;
        }

        if (entry.Request.PublishEverySteps is int every && run.Cursor.Step % every == 0)
        {
            PublishIfFits(entry);
        }

        StartAhead(entry);
        entry.Handle!.Report(entry.ProgressAt(FinetuningStatus.Running, now));
    }
}
