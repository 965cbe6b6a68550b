using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>Rows of a batch that go through one adapter.</summary>
internal readonly record struct AdapterRows(int RowStart, int RowCount, PeftAdapter Adapter);

/// <summary>
/// Rows of a batch that are a finetuning window: positions [PositionStart, PositionStart + RowCount) of the sample whose
/// activations the store keeps. Targets has one entry a row (-1 where there is no target).
/// </summary>
internal readonly record struct WindowRows(
    int RowStart, int RowCount, int PositionStart, ActivationStore Store, ReadOnlyMemory<int> Targets, float GradientScale);

/// <summary>The rows of one step, as columns: inference rows first, then finetuning windows. Reused from step to step.</summary>
internal sealed class TokenBatch(int rowsMax)
{
    private readonly int[] _ids = new int[rowsMax];
    private readonly int[] _positions = new int[rowsMax];
    private readonly List<AttentionSegment> _segments = [];
    private readonly List<AdapterRows> _adapters = [];
    private readonly List<WindowRows> _windows = [];
    private readonly List<int> _sampled = [];

    public int Rows { get; private set; }

    public ReadOnlySpan<int> Ids => _ids.AsSpan(0, Rows);

    public ReadOnlySpan<int> Positions => _positions.AsSpan(0, Rows);

    /// <summary>One segment a sequence or window, in row order.</summary>
    public IReadOnlyList<AttentionSegment> Segments => _segments;

    public IReadOnlyList<AdapterRows> Adapters => _adapters;

    public IReadOnlyList<WindowRows> Windows => _windows;

    /// <summary>Rows whose logits the sampler wants, ascending.</summary>
    public IReadOnlyList<int> SampledRows => _sampled;

    public void Clear()
    {
        Rows = 0;
        _segments.Clear();
        _adapters.Clear();
        _windows.Clear();
        _sampled.Clear();
    }

    /// <summary>Appends inference rows of one sequence; logits are wanted of the last <paramref name="sampled"/> ones.</summary>
    public void AddInference(
        ReadOnlySpan<int> ids, int positionStart, DeviceKvCache cache, int[] blockTable, PeftAdapter? adapter, int sampled)
    {
        Check.That(_windows.Count == 0 && sampled <= ids.Length);
        int start = AddRows(ids, positionStart, adapter);
        _segments.Add(new AttentionSegment(start, ids.Length, positionStart, cache, blockTable));
        for (int row = Rows - sampled; row < Rows; row++)
        {
            _sampled.Add(row);
        }
    }

    /// <summary>Appends a finetuning window of the store's sample.</summary>
    public void AddWindow(
        ReadOnlySpan<int> ids, ReadOnlyMemory<int> targets, int positionStart, ActivationStore store, PeftAdapter adapter,
        float gradientScale)
    {
        Check.That(targets.Length == ids.Length);
        int start = AddRows(ids, positionStart, adapter);
        _segments.Add(new AttentionSegment(start, ids.Length, positionStart, store.KvCache, store.BlockTable));
        _windows.Add(new WindowRows(start, ids.Length, positionStart, store, targets, gradientScale));
    }

    private int AddRows(ReadOnlySpan<int> ids, int positionStart, PeftAdapter? adapter)
    {
        int start = Rows;
        Check.That(ids.Length > 0 && start + ids.Length <= rowsMax);
        ids.CopyTo(_ids.AsSpan(start));
        for (int i = 0; i < ids.Length; i++)
        {
            _positions[start + i] = positionStart + i;
        }

        Rows += ids.Length;
        if (adapter is null)
        {
            return start;
        }

        if (_adapters.Count > 0 && _adapters[^1] is AdapterRows last && last.Adapter == adapter && last.RowStart + last.RowCount == start)
        {
            _adapters[^1] = last with { RowCount = last.RowCount + ids.Length };
        }
        else
        {
            _adapters.Add(new AdapterRows(start, ids.Length, adapter));
        }

        return start;
    }
}
