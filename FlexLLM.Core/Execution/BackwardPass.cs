using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>
/// Interprets the backward program of one layer for one window of rows. Items of a sample run layer by layer from the top,
/// windows from the end of the sequence (paper section 6.1, layer-outer order); any other order is a broken invariant of the
/// caller.
/// </summary>
internal sealed class BackwardPass(LoadedModel model, int rowsMax) : IDisposable
{
    // Programs of different jobs need different slots: one workspace a program, dropped with its job.
    private readonly Dictionary<TrainingProgram, Workspace> _workspaces = [];

    /// <summary>What the pass holds for a program, in the rows of <see cref="MemoryPlan.OfJob"/>.</summary>
    public MemoryTable Memory(TrainingProgram program) => new(
        _workspaces.TryGetValue(program, out Workspace? workspace)
            ? [new(MemoryUse.BackwardWorkspace, "slots", program.SlotColumns.Count, workspace.Bytes)]
            : []);

    /// <summary>Makes the workspace of a program before its first run needs it.</summary>
    public void Reserve(TrainingProgram program)
    {
        if (!_workspaces.ContainsKey(program))
        {
            _workspaces.Add(program, new Workspace(model.Backend, program.SlotColumns, rowsMax));
        }
    }

    /// <summary>
    /// Takes the gradient of rows [start, start + count) through a layer: adds to the gradients of the adapter's sites there and
    /// replaces those rows of the boundary gradient.
    /// </summary>
    public void Run(
        ActivationStore store, int layer, int start, int count, int sampleTokens, LoraAdapter adapter, AdapterGradients gradients)
    {
        Check.That(count > 0 && count <= rowsMax && start >= 0 && start + count <= sampleTokens && sampleTokens <= store.TokensMax);
        TrainingProgram program = store.Program;
        Check.That(layer >= program.LowestLayer);
        Reserve(program);
        if (start + count == sampleTokens)
        {
            model.Backend.Zero(store.KeyGradient.Slice(0, sampleTokens));
            model.Backend.Zero(store.ValueGradient.Slice(0, sampleTokens));
        }

        var window = new Window(store, _workspaces[program], layer, start, count);
        foreach (Instruction instruction in program.Layers[layer])
        {
            Execute(instruction, window, adapter, gradients);
        }
    }

    /// <summary>Frees the workspace of a program that no job uses any more, or for a while.</summary>
    public void Release(TrainingProgram program)
    {
        if (_workspaces.Remove(program, out Workspace? workspace))
        {
            workspace.Dispose();
        }
    }

    public void Dispose()
    {
        foreach (Workspace workspace in _workspaces.Values)
        {
            workspace.Dispose();
        }

        _workspaces.Clear();
    }

    private void Execute(Instruction instruction, Window window, LoraAdapter adapter, AdapterGradients gradients)
    {
        IComputeBackend backend = model.Backend;
        BufferRef[] inputs = instruction.Inputs;
        BufferRef[] outputs = instruction.Outputs;
        switch (instruction.Op)
        {
            case OpKind.LinearBackwardInput:
                backend.LinearBackwardInput(
                    window.Rows(inputs[0]), model.Matrix(instruction.Weight), window.Rows(outputs[0]), instruction.Accumulate);
                break;
            case OpKind.RmsNormBackward:
                backend.RmsNormBackward(
                    window.Rows(inputs[1]), model.Vector(instruction.Weight), (float)model.Config.RmsNormEpsilon, window.Rows(inputs[0]),
                    window.Rows(outputs[0]), instruction.Accumulate);
                break;
            case OpKind.LoraBackward:
                TensorSlice? dx = outputs[0].Kind == BufferKind.None ? null : window.Rows(outputs[0]);
                if (dx is TensorSlice fresh && !instruction.Accumulate)
                {
                    backend.Zero(fresh);
                }

                (DeviceTensor gradA, DeviceTensor gradB) = gradients[instruction.Site];
                backend.LoraBypassBackward(
                    window.Rows(inputs[1]), window.Rows(inputs[0]), adapter[instruction.Site]!, adapter.Scale, gradA, gradB, dx);
                break;
            case OpKind.RopeBackward or OpKind.Rope:
                Span<int> positions = stackalloc int[window.Count];
                for (int i = 0; i < positions.Length; i++)
                {
                    positions[i] = window.Start + i;
                }

                backend.Rope(window.Rows(outputs[0]), positions, model.RopeTable, inverse: instruction.Op == OpKind.RopeBackward);
                break;
            case OpKind.RmsNorm:
                backend.RmsNorm(
                    window.Rows(inputs[0]), model.Vector(instruction.Weight), (float)model.Config.RmsNormEpsilon, window.Rows(outputs[0]));
                break;
            case OpKind.SiluGate:
                backend.SiluGate(window.Rows(inputs[0]), window.Rows(inputs[1]), window.Rows(outputs[0]));
                break;
            case OpKind.SiluGateBackward:
                backend.SiluGateBackward(
                    window.Rows(inputs[1]), window.Rows(inputs[2]), window.Rows(inputs[0]), window.Rows(outputs[0]),
                    window.Rows(outputs[1]));
                break;
            case OpKind.AttentionBackward:
                ActivationStore store = window.Store;
                var segment = new AttentionSegment(
                    0, window.Count, window.Start, store.KvCache, store.BlockTable, store.LogSumExp(window.Layer));
                backend.AttentionBackward(
                    window.Rows(inputs[1]), window.Rows(inputs[0]), window.Layer, segment, window.Rows(outputs[0]), store.KeyGradient,
                    store.ValueGradient);
                break;
            case OpKind.AddGradient:
                backend.Add(window.Rows(inputs[0]), window.Rows(inputs[1]), window.Rows(outputs[0]));
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(instruction), instruction.Op, "Not a backward operation.");
        }
    }

    /// <summary>Resolves buffers for rows [Start, Start + Count) of one layer.</summary>
    private readonly record struct Window(ActivationStore Store, Workspace Workspace, int Layer, int Start, int Count)
    {
        public TensorSlice Rows(BufferRef buffer) => buffer.Kind switch
        {
            BufferKind.Slot => Workspace.Rows(buffer.Index, 0, Count),
            BufferKind.Saved => Store.Saved(buffer.Index).Slice(Start, Count),
            BufferKind.Boundary => Store.Boundary.Slice(Start, Count),
            BufferKind.KeyGradient => Store.KeyGradient.Slice(Start, Count),
            BufferKind.ValueGradient => Store.ValueGradient.Slice(Start, Count),
            _ => throw new ArgumentOutOfRangeException(nameof(buffer), buffer.Kind, "This buffer holds no rows."),
        };
    }
}
