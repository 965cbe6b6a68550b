using FlexLLM.Execution;
using FlexLLM.KvCache;
using FlexLLM.Scheduling;

namespace FlexLLM.Engine;

/// <summary>Who gives way where memory is short.</summary>
internal sealed partial class EngineLoop
{
    /// <summary>Makes room for the weights of an adapter.</summary>
    /// <exception cref="RequestRejectedException">The device has none.</exception>
    public void RequireRoom(string adapter, PeftConfig config)
    {
        MemoryTable needs = _memory.OfAdapter(config);
        Budget.Require(needs.Bytes, $"Adapter '{adapter}'", needs, _ => "Unload others, or wait for jobs to end.");
    }

    private int BlocksPromised() => _sequences.Values.Select(s => BlockTable.BlocksFor(s.TokensMax)).DefaultIfEmpty().Max();

    private void Vacate(int firstBlock)
    {
        foreach (InferenceSequence sequence in _sequences.Values.Where(s => s.Blocks.HoldsFrom(firstBlock)))
        {
            Preempt(sequence);
        }
    }

    // Memory ran out inside a batch, whose rows are computed again. Each call takes something away for it: the jobs in the batch, else
    // memory that can be spared, else the newest request. So a step follows that fits, or nobody is left.
    private void Relieve(StepPlan plan, Exception fault)
    {
        InsufficientMemoryException cause = DeviceBudget.RanOut("inside a step", fault);
        foreach (ForwardWindow window in plan.Forward)
        {
            Jobs.Fail(window.Id, Now, cause);
        }

        if (plan.Forward.IsEmpty && !Budget.TryLeave() &&
            _sequences.Values.LastOrDefault(s => s.Phase == SequencePhase.Running) is InferenceSequence newest)
        {
            Finish(newest, GeneratedToken.Failed(cause.Message));
        }
    }
}
