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

    private readonly Dictionary<int, DeviceTensor> _frozen = [];
    private float[] _poison = [];

    /// <summary>Fills what nobody may read any more with NaN after each instruction: a check of the memory plan.</summary>
    public bool PoisonsFreed { get; init; }

    /// <summary>What the pass holds for a program, in the rows of <see cref="MemoryPlan.OfJob"/>.</summary>
    public MemoryTable Memory(TrainingProgram program) => new(
        _workspaces.TryGetValue(program, out Workspace? workspace)
            ? [new(MemoryUse.BackwardWorkspace, "slots", program.Arena.Slots.Count, workspace.Bytes)]
            : []);

    /// <summary>Makes the workspace of a program before its first run needs it.</summary>
    public void Reserve(TrainingProgram program)
    {
        if (!_workspaces.ContainsKey(program))
        {
            _workspaces.Add(program, new Workspace(model.Backend, program.Arena, rowsMax));
        }
    }

    /// <summary>
    /// Takes the gradient of rows [start, start + count) through a layer: adds to the gradients of the adapter's sites there and
    /// replaces those rows of the boundary gradient.
    /// </summary>
    public void Run(
        ActivationStore store, int layer, int start, int count, int sampleTokens, PeftAdapter adapter, AdapterGradients gradients)
    {
        Check.That(count > 0 && count <= rowsMax && start >= 0 && start + count <= sampleTokens && sampleTokens <= store.TokensMax);
        TrainingProgram program = store.Program;
        Check.That(layer >= program.LowestLayer);
        Reserve(program);
        Workspace workspace = _workspaces[program];
        if (start + count == sampleTokens)
        {
            model.Backend.Zero(store.KeyGradient.Slice(0, sampleTokens));
            model.Backend.Zero(store.ValueGradient.Slice(0, sampleTokens));
        }

        var window = new Window(store, workspace, layer, start, count);
        foreach (Instruction instruction in program.Layers[layer])
        {
            Execute(instruction, window, adapter, gradients);
            if (PoisonsFreed)
            {
                workspace.Poison(instruction.Frees, count);
            }
        }

        if (PoisonsFreed)
        {
            foreach (int saved in program.Layers[layer].SelectMany(i => i.Inputs)
                .Where(i => i.Kind == BufferKind.Saved && program.Saved[i.Index].Packed is null).Select(i => i.Index))
            {
                Workspace.Poison(model.Backend, store.Saved(saved).Slice(start, count), ref _poison);
            }
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
        foreach (DeviceTensor gradient in _frozen.Values)
        {
            gradient.Dispose();
        }
    }

    private void Execute(Instruction instruction, Window window, PeftAdapter adapter, AdapterGradients gradients)
    {
        IComputeBackend backend = model.Backend;
        float epsilon = (float)model.Config.RmsNormEpsilon;
        BufferRef[] inputs = instruction.Inputs;
        BufferRef output = instruction.Outputs[0];
        if (instruction.Op == OpKind.Move)
        {
            Moves.Run(backend, instruction.Move, window.Rows(inputs[0]), window.Rows(output));
            return;
        }

        if (instruction.Site >= 0)
        {
            ExecuteBypass(instruction, window, adapter, gradients);
            return;
        }

        switch (instruction.Op)
        {
            case OpKind.Linear:
                DeviceTensor? bias = instruction.Bias < 0 ? null : model.Vector(instruction.Bias);
                backend.Linear(window.Rows(inputs[0]), model.Matrix(instruction.Weight), bias, window.Rows(output), accumulate: false);
                break;
            case OpKind.LinearBackwardInput:
                backend.LinearBackwardInput(
                    window.Rows(inputs[0]), model.Matrix(instruction.Weight), window.Rows(output), instruction.Accumulate);
                break;
            case OpKind.RmsNorm:
                backend.RmsNorm(window.Rows(inputs[0]), model.Vector(instruction.Weight), epsilon, window.Rows(output));
                break;
            case OpKind.RmsNormBackward:
                backend.RmsNormBackward(
                    window.Rows(inputs[1]), model.Vector(instruction.Weight), epsilon, window.Rows(inputs[0]), window.Rows(output),
                    instruction.Accumulate);
                break;
            case OpKind.RopeBackward or OpKind.Rope:
                Span<int> positions = stackalloc int[window.Count];
                for (int i = 0; i < positions.Length; i++)
                {
                    positions[i] = window.Start + i;
                }

                backend.Rope(window.Rows(output), positions, model.RopeTable, inverse: instruction.Op == OpKind.RopeBackward);
                break;
            case OpKind.SiluGate:
                backend.SiluGate(window.Rows(inputs[0]), window.Rows(inputs[1]), window.Rows(output));
                break;
            case OpKind.SiluGateBackward:
                backend.SiluGateBackward(
                    window.Rows(inputs[1]), window.Rows(inputs[2]), window.Rows(inputs[0]), window.Rows(output),
                    window.Rows(instruction.Outputs[1]));
                break;
            case OpKind.ReluBackward:
                backend.ReluBackward(window.Rows(inputs[1]), window.Rows(inputs[0]), window.Rows(output));
                break;
            case OpKind.SiluBackward:
                backend.SiluBackward(window.Rows(inputs[1]), window.Rows(inputs[0]), window.Rows(output));
                break;
            case OpKind.Attention:
                backend.Attention(window.Rows(inputs[0]), window.Rows(output), window.Layer, [window.Segment(logSumExp: null)]);
                break;
            case OpKind.AttentionBackward:
                backend.AttentionBackward(
                    window.Rows(inputs[1]), window.Rows(inputs[0]), window.Layer,
                    window.Segment(window.Store.LogSumExp(window.Layer)), window.Rows(output), window.Store.KeyGradient,
                    window.Store.ValueGradient);
                break;
            case OpKind.Add or OpKind.AddGradient:
                backend.Add(window.Rows(inputs[0]), window.Rows(inputs[1]), window.Rows(output));
                break;
            case OpKind.LinearBackwardWeight:
                backend.AddOuter(window.Rows(inputs[0]), window.Rows(inputs[1]), 1, FrozenGradient(instruction.Weight));
                break;
            case OpKind.RmsNormBackwardGain:
                break; // Nobody reads it; that its input is saved is what an unpruned graph is about.
            case OpKind.Unpack:
                backend.Unpack(window.Rows(inputs[0]), instruction.Packed!.Value, window.Rows(output));
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(instruction), instruction.Op, "Not a backward operation.");
        }
    }

    // An unpruned graph computes what nobody asked for; it exists to show that pruning changes nothing else.
    private DeviceTensor FrozenGradient(int weight)
    {
        if (!_frozen.TryGetValue(weight, out DeviceTensor? gradient))
        {
            DeviceWeight matrix = model.Matrix(weight);
            _frozen.Add(weight, gradient = model.Backend.Allocate(matrix.OutFeatures, matrix.InFeatures));
        }

        return gradient;
    }

    private void ExecuteBypass(Instruction instruction, Window window, PeftAdapter adapter, AdapterGradients gradients)
    {
        IComputeBackend backend = model.Backend;
        IReadOnlyList<AdapterTensor> tensors = adapter[instruction.Site]!.Tensors;
        IReadOnlyList<DeviceTensor> gradient = gradients[instruction.Site];
        float scale = instruction.Scaled ? adapter.Scale : 1;
        TensorSlice first = window.Rows(instruction.Inputs[0]);
        TensorSlice? output = instruction.Outputs[0].Kind == BufferKind.None ? null : window.Rows(instruction.Outputs[0]);
        switch (instruction.Op)
        {
            case OpKind.OuterProduct:
                backend.AddOuter(first, window.Rows(instruction.Inputs[1]), scale, gradient[instruction.Weight]);
                break;
            case OpKind.AddBiasBackward:
                backend.AddColumnSums(first, gradient[instruction.Weight]);
                break;
            case OpKind.ScaleColumnsBackward:
                backend.ScaleColumnsBackward(
                    window.Rows(instruction.Inputs[1]), first, tensors[instruction.Weight].Values, gradient[instruction.Weight], output,
                    instruction.Accumulate);
                break;
            case OpKind.Lora:
                var segment = new LoraSegment(0, window.Count, tensors[0].Factor!, tensors[1].Factor!, adapter.Scale);
                backend.LoraBypass(first, [segment], output!.Value);
                break;
            case OpKind.LoraBackward:
                if (output is TensorSlice fresh && !instruction.Accumulate)
                {
                    backend.Zero(fresh);
                }

                backend.LoraBypassBackward(
                    window.Rows(instruction.Inputs[1]), first, tensors[0].Factor!, tensors[1].Factor!, adapter.Scale, gradient[0],
                    gradient[1], output);
                break;
            default:
                BypassOps.Run(backend, instruction, tensors, adapter.Scale, first, output!.Value, instruction.Accumulate);
                break;
        }
    }

    /// <summary>Resolves buffers for rows [Start, Start + Count) of one layer.</summary>
    private readonly record struct Window(ActivationStore Store, Workspace Workspace, int Layer, int Start, int Count)
    {
        public TensorSlice Rows(BufferRef buffer) => buffer.Kind switch
        {
            BufferKind.Slot => Workspace.Rows(buffer, Count),
            BufferKind.Saved => Store.Saved(buffer.Index).Slice(Start, Count),
            BufferKind.Boundary => Store.Boundary.Slice(Start, Count),
            BufferKind.KeyGradient => Store.KeyGradient.Slice(Start, Count),
            BufferKind.ValueGradient => Store.ValueGradient.Slice(Start, Count),
            _ => throw new ArgumentOutOfRangeException(nameof(buffer), buffer.Kind, "This buffer holds no rows."),
        };

        /// <summary>The window as rows 0 to Count of a call, over the sample's keys and values.</summary>
        public AttentionSegment Segment(DeviceTensor? logSumExp) =>
            new(0, Count, Start, Store.KvCache, Store.BlockTable, logSumExp);
    }
}
