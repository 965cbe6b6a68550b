using System.Globalization;
using System.Text;

namespace FlexLLM.Execution;

/// <summary>What device memory is held for; the categories of a <see cref="MemoryTable"/>.</summary>
internal static class MemoryUse
{
    public const string Weights = "weights";
    public const string RotaryTable = "rotary table";
    public const string KvCache = "KV cache";
    public const string ForwardWorkspace = "workspace of the forward pass";
    public const string Logits = "logits";
    public const string Scratch = "scratch of the backend";
    public const string SavedActivations = "saved activations";
    public const string SampleKv = "keys and values of the sample";
    public const string LayerGradient = "gradient between layers";
    public const string KvGradients = "key and value gradients";
    public const string Losses = "losses";
    public const string BackwardWorkspace = "workspace of the backward pass";
    public const string AdapterWeights = "adapter weights";
    public const string AdapterGradients = "adapter gradients";
    public const string OptimizerState = "optimizer state";

    /// <summary>What a job gives back while it is paused in the forward phase of a sample.</summary>
    public static readonly string[] Arenas = [SavedActivations, SampleKv, LayerGradient, KvGradients, Losses, BackwardWorkspace];
}

/// <summary>So many buffers of one kind, and their bytes together.</summary>
/// <param name="Use">Category, of <see cref="MemoryUse"/>.</param>
/// <param name="Item">What the buffers are within the category, for example the operator whose values they keep.</param>
/// <param name="Count">Buffers.</param>
/// <param name="Bytes">Device bytes.</param>
internal sealed record MemoryRow(string Use, string Item, int Count, long Bytes);

/// <summary>Device memory by category: planned (<see cref="MemoryPlan"/>) or held.</summary>
internal sealed class MemoryTable(IEnumerable<MemoryRow> rows)
{
    /// <summary>Rows of a category stand together.</summary>
    public IReadOnlyList<MemoryRow> Rows { get; } = [.. rows.GroupBy(r => r.Use).SelectMany(g => g)];

    public long Bytes => Rows.Sum(r => r.Bytes);

    /// <summary>The categories, in the order of the rows.</summary>
    public IEnumerable<string> Uses => Rows.Select(r => r.Use).Distinct();

    /// <summary>Bytes of some categories together.</summary>
    public long Of(params string[] uses) => Rows.Where(r => uses.Contains(r.Use)).Sum(r => r.Bytes);

    public static MemoryTable operator +(MemoryTable a, MemoryTable b) => new(a.Rows.Concat(b.Rows));

    /// <summary>Bytes as people read them.</summary>
    public static string MiB(long bytes) => string.Create(CultureInfo.InvariantCulture, $"{bytes / 1048576.0:N2} MiB");

    /// <summary>A line a category, below it a line a row where it has several, in MiB.</summary>
    public override string ToString()
    {
        var text = new StringBuilder();
        Line(string.Empty, "count", "MiB");
        foreach (string use in Uses)
        {
            MemoryRow[] rows = [.. Rows.Where(r => r.Use == use)];
            Line(use, rows.Length == 1 ? Number(rows[0].Count) : string.Empty, Amount(rows.Sum(r => r.Bytes)));
            foreach (MemoryRow row in rows.Length == 1 ? [] : rows)
            {
                Line("  " + row.Item, Number(row.Count), Amount(row.Bytes));
            }
        }

        Line("together", string.Empty, Amount(Bytes));
        return text.ToString();

        void Line(string name, string count, string amount) =>
            text.Append(CultureInfo.InvariantCulture, $"  {name,-34}{count,8}{amount,14}\n");

        static string Number(int value) => value.ToString(CultureInfo.InvariantCulture);

        static string Amount(long bytes) => (bytes / 1048576.0).ToString("N2", CultureInfo.InvariantCulture);
    }
}
