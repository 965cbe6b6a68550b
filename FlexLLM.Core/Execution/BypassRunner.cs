using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Graph;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>
/// Runs the networks that the adapters of a batch have at one site: LoRA of all adapters in one call, other methods adapter by
/// adapter, operation by operation.
/// </summary>
internal sealed class BypassRunner : IDisposable
{
    private readonly IComputeBackend _backend;
    private readonly int _rowsMax;
    private readonly DeviceTensor _arena;
    private readonly List<LoraSegment> _lora = [];

    // Views of one arena, for as long as an adapter with that program lives.
    private readonly ConditionalWeakTable<BypassProgram, Workspace> _workspaces = [];

    /// <param name="backend">The device.</param>
    /// <param name="rowsMax">Most rows of a batch.</param>
    /// <param name="config">The model whose values bypasses are added to.</param>
    public BypassRunner(IComputeBackend backend, int rowsMax, ModelConfig config)
    {
        _backend = backend;
        _rowsMax = rowsMax;
        _arena = backend.Allocate(rowsMax, ArenaColumns(config), TensorUse.Activation);
    }

    public long Bytes => _arena.Bytes;

    /// <summary>Room for two values inside a network and its result.</summary>
    public static int ArenaColumns(ModelConfig config)
    {
        int widest = Math.Max(config.IntermediateSize, Math.Max(config.HiddenSize, config.AttentionHeads * config.HeadDim));
        return (2 * SerialAdapterConfig.SizeMax) + ArenaLayout.Padded(widest);
    }

    /// <summary>Adds to rows of <paramref name="sum"/> what each row's adapter makes of <paramref name="tap"/>.</summary>
    public void Run(int site, BypassAttachment attachment, IReadOnlyList<AdapterRows> adapters, TensorSlice tap, TensorSlice sum)
    {
        _lora.Clear();
        foreach (AdapterRows rows in adapters)
        {
            if (rows.Adapter[site] is not AdapterSite own || own.Attachment != attachment)
            {
                continue;
            }

            if (own.IsLora)
            {
                _lora.Add(new LoraSegment(
                    rows.RowStart, rows.RowCount, own.Tensors[0].Factor!, own.Tensors[1].Factor!, rows.Adapter.Scale));
            }
            else
            {
                Run(own, rows.Adapter.Scale, tap.Slice(rows.RowStart, rows.RowCount), sum.Slice(rows.RowStart, rows.RowCount));
            }
        }

        if (_lora.Count > 0)
        {
            _backend.LoraBypass(tap, CollectionsMarshal.AsSpan(_lora), sum);
        }
    }

    public void Dispose() => _arena.Dispose();

    private void Run(AdapterSite site, float scale, TensorSlice tap, TensorSlice sum)
    {
        if (!_workspaces.TryGetValue(site.Program, out Workspace? workspace))
        {
            Check.That(site.Program.Arena.Columns <= _arena.Columns);
            workspace = new Workspace(_backend, site.Program.Arena, _rowsMax, _arena);
            _workspaces.Add(site.Program, workspace);
        }

        foreach (Instruction step in site.Program.Steps)
        {
            TensorSlice x = Rows(step.Inputs[0]);
            TensorSlice y = Rows(step.Outputs[0]);
            if (step.Op == OpKind.Add)
            {
                _backend.Add(x, Rows(step.Inputs[1]), y);
            }
            else if (step.Op == OpKind.Move)
            {
                Moves.Run(_backend, step.Move, x, y);
            }
            else
            {
                BypassOps.Run(_backend, step, site.Tensors, scale, x, y, accumulate: false);
            }
        }

        TensorSlice Rows(BufferRef buffer) => buffer.Kind switch
        {
            BufferKind.Tap => tap,
            BufferKind.Sum => sum,
            _ => workspace.Rows(buffer, tap.Rows),
        };
    }
}

/// <summary>The forward operations of networks, as they run while serving and again in a backward pass.</summary>
internal static class BypassOps
{
    public static void Run(
        IComputeBackend backend, Instruction step, IReadOnlyList<AdapterTensor> tensors, float scale, TensorSlice x, TensorSlice y,
        bool accumulate)
    {
        scale = step.Scaled ? scale : 1;
        switch (step.Op)
        {
            case OpKind.Narrow:
                backend.Narrow(x, tensors[step.Weight].Factor!, scale, y, accumulate);
                break;
            case OpKind.Widen:
                backend.Widen(x, tensors[step.Weight].Factor!, scale, y, accumulate);
                break;
            case OpKind.AddBias:
                Moves.Run(backend, MoveKind.Pass, x, y);
                AddBias(backend, y, tensors[step.Weight].Values, step.OnRankZeroOnly);
                break;
            case OpKind.Relu:
                backend.Relu(x, y);
                break;
            case OpKind.Silu:
                backend.Silu(x, y);
                break;
            case OpKind.ScaleColumns:
                backend.ScaleColumns(x, tensors[step.Weight].Values, y, accumulate);
                break;
            default:
                throw new ArgumentOutOfRangeException(nameof(step), step.Op, "Run the new operation here.");
        }
    }

    // A bias of partial sums enters their sum once.
    private static void AddBias(IComputeBackend backend, TensorSlice y, DeviceTensor bias, bool onRankZeroOnly)
    {
        if (!onRankZeroOnly || backend is not GroupBackend group)
        {
            backend.AddBias(y, bias);
            return;
        }

        group.Note(rank =>
        {
            if (rank.Index == 0)
            {
                rank.Device.AddBias(rank.Of(y), rank.Of(bias));
            }
        });
    }
}
