using System.Runtime.InteropServices;
using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>
/// Interprets the forward program over a batch: one backend call an instruction, for inference rows and finetuning windows
/// alike. Windows differ only in what happens beside: their saved values are copied out, and their loss is computed.
/// </summary>
internal sealed class ForwardPass : IDisposable
{
    private readonly LoadedModel _model;
    private readonly Workspace _workspace;
    private readonly List<AttentionSegment> _segments = [];
    private readonly BypassRunner _bypasses;
    private readonly DeviceTensor _logits;
    private readonly ResourceSet _owned = new();

    /// <param name="model">The model.</param>
    /// <param name="rowsMax">Most rows of a batch.</param>
    /// <param name="sampledMax">Most rows of a batch whose logits are wanted.</param>
    public ForwardPass(LoadedModel model, int rowsMax, int sampledMax)
    {
        _model = model;
        ModelConfig config = model.Config;
        try
        {
            _workspace = _owned.Add(new Workspace(model.Backend, model.Program.Arena, rowsMax));
            _bypasses = _owned.Add(new BypassRunner(model.Backend, rowsMax, config));
            _logits = _owned.Add(model.Backend.Allocate(sampledMax, config.VocabularySize));
        }
        catch
        {
            _owned.Dispose();
            throw;
        }
    }

    /// <summary>What the pass holds, in the rows of <see cref="MemoryPlan.OfForwardPass"/>.</summary>
    public MemoryTable Memory() => new(
    [
        new(MemoryUse.ForwardWorkspace, "slots", _model.Program.Arena.Slots.Count, _workspace.Bytes),
        new(MemoryUse.ForwardWorkspace, "networks of adapters", 1, _bypasses.Bytes),
        new(MemoryUse.Logits, "rows", _logits.Rows, _logits.Bytes),
    ]);

    /// <summary>Fills what nobody may read any more with NaN after each instruction: a check of the memory plan.</summary>
    public bool PoisonsFreed { get; init; }

    /// <summary>
    /// Runs all rows. Row i of the result holds the logits of the batch's i-th sampled row; valid until the next run.
    /// </summary>
    public TensorSlice Run(TokenBatch batch) => Run(batch, isGivenUp: null)!.Value;

    /// <summary>
    /// Runs all rows, or stops before the attention of a layer when told to: null. What was written by then (keys and values, saved
    /// rows) is written again when the same windows run again.
    /// </summary>
    public TensorSlice? Run(TokenBatch batch, Func<bool>? isGivenUp)
    {
        Check.That(batch.Rows > 0 && batch.Rows <= _workspace.RowsMax);
        IReadOnlyList<Instruction> body = _model.Program.Body;
        for (int i = 0; i < body.Count; i++)
        {
            if (isGivenUp is not null && body[i].Op == OpKind.Attention)
            {
                _model.Backend.Synchronize();
                if (isGivenUp())
                {
                    return null;
                }
            }

            Execute(body[i], batch);
            foreach (WindowRows window in batch.Windows)
            {
                CaptureRows(window, i);
            }

            if (PoisonsFreed)
            {
                _workspace.Poison(body[i].Frees, batch.Rows);
            }
        }

        foreach (WindowRows window in batch.Windows)
        {
            RunLoss(window);
        }

        return RunLogits(batch);
    }

    public void Dispose()
    {
        _owned.Dispose();
    }

    private void Execute(Instruction instruction, TokenBatch batch)
    {
        IComputeBackend backend = _model.Backend;
        int rows = batch.Rows;
        TensorSlice y = Rows(instruction.Outputs[0], 0, rows);
        switch (instruction.Op)
        {
            case OpKind.Embed:
                backend.Gather(_model.Matrix(instruction.Weight), batch.Ids, y);
                break;
            case OpKind.RmsNorm:
                backend.RmsNorm(
                    Rows(instruction.Inputs[0], 0, rows), _model.Vector(instruction.Weight), (float)_model.Config.RmsNormEpsilon, y);
                break;
            case OpKind.Linear:
                DeviceTensor? bias = instruction.Bias < 0 ? null : _model.Vector(instruction.Bias);
                backend.Linear(Rows(instruction.Inputs[0], 0, rows), _model.Matrix(instruction.Weight), bias, y, accumulate: false);
                break;
            case OpKind.Bypass:
                _bypasses.Run(instruction.Site, instruction.Attachment, batch.Adapters, Rows(instruction.Inputs[0], 0, rows), y);
                break;
            case OpKind.Move:
                Moves.Run(backend, instruction.Move, Rows(instruction.Inputs[0], 0, rows), y);
                break;
            case OpKind.Rope:
                backend.Rope(y, batch.Positions, _model.RopeTable, inverse: false);
                break;
            case OpKind.Attention:
                ReadOnlySpan<AttentionSegment> segments = SegmentsOf(batch, instruction.Layer);
                TensorSlice k = Rows(instruction.Inputs[1], 0, rows);
                TensorSlice v = Rows(instruction.Inputs[2], 0, rows);
                backend.AppendKv(k, v, instruction.Layer, segments);
                backend.Attention(Rows(instruction.Inputs[0], 0, rows), y, instruction.Layer, segments);
                break;
            case OpKind.SiluGate:
                backend.SiluGate(Rows(instruction.Inputs[0], 0, rows), Rows(instruction.Inputs[1], 0, rows), y);
                break;
            case OpKind.Add:
                backend.Add(Rows(instruction.Inputs[0], 0, rows), Rows(instruction.Inputs[1], 0, rows), y);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(instruction), instruction.Op, "Not a forward operation.");
        }
    }

    private void CaptureRows(WindowRows window, int instruction)
    {
        IReadOnlyList<Capture> captures = window.Store.Program.Captures;
        for (int i = window.Store.Program.FirstCaptureAt(instruction); i < captures.Count && captures[i].Instruction == instruction; i++)
        {
            TensorSlice rows = _workspace.Rows(captures[i].Slot, window.RowStart, window.RowCount);
            TensorSlice saved = window.Store.Saved(captures[i].Saved).Slice(window.PositionStart, window.RowCount);
            if (window.Store.Program.Saved[captures[i].Saved].Packed is PackedFormat format)
            {
                _model.Backend.Pack(rows, format, saved);
            }
            else
            {
                _model.Backend.Copy(rows, saved);
            }
        }
    }

    private void RunLoss(WindowRows window)
    {
        foreach (Instruction instruction in _model.Program.Loss)
        {
            TensorSlice first = Rows(instruction.Inputs[0], window.RowStart, window.RowCount);
            switch (instruction.Op)
            {
                case OpKind.CrossEntropy:
                    _model.Backend.FusedLinearCrossEntropy(
                        first, window.Targets.Span, _model.Matrix(instruction.Weight), window.GradientScale,
                        Rows(instruction.Outputs[1], window.RowStart, window.RowCount),
                        window.Store.Losses.Slice(window.PositionStart, window.RowCount));
                    break;
                case OpKind.RmsNormBackward:
                    _model.Backend.RmsNormBackward(
                        Rows(instruction.Inputs[1], window.RowStart, window.RowCount), _model.Vector(instruction.Weight),
                        (float)_model.Config.RmsNormEpsilon, first,
                        window.Store.Boundary.Slice(window.PositionStart, window.RowCount), accumulate: false);
                    break;
                default:
                    throw new ArgumentOutOfRangeException(nameof(window), instruction.Op, "Not a loss operation.");
            }
        }
    }

    private TensorSlice RunLogits(TokenBatch batch)
    {
        Instruction instruction = _model.Program.Logits;
        TensorSlice logits = _logits.Slice(0, batch.SampledRows.Count);
        if (batch.SampledRows.Count > 0)
        {
            ReadOnlySpan<int> rows = CollectionsMarshal.AsSpan((List<int>)batch.SampledRows);
            _model.Backend.Logits(Rows(instruction.Inputs[0], 0, batch.Rows), rows, _model.Matrix(instruction.Weight), logits);
        }

        return logits;
    }

    private TensorSlice Rows(BufferRef buffer, int start, int count)
    {
        Check.That(buffer.Kind == BufferKind.Slot);
        return _workspace.Rows(buffer.Index, start, count);
    }

    // Windows stand after all inference segments; theirs get the place for this layer's log-sum-exp.
    private ReadOnlySpan<AttentionSegment> SegmentsOf(TokenBatch batch, int layer)
    {
        _segments.Clear();
        _segments.AddRange(batch.Segments);
        int firstWindow = batch.Segments.Count - batch.Windows.Count;
        for (int i = 0; i < batch.Windows.Count; i++)
        {
            _segments[firstWindow + i] = _segments[firstWindow + i] with { LogSumExp = batch.Windows[i].Store.LogSumExp(layer) };
        }

        return CollectionsMarshal.AsSpan(_segments);
    }
}
