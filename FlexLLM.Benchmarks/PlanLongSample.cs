using System.Text.Json;
using FlexLLM.Finetuning;
using FlexLLM.Models;
using FlexLLM.Primitives;
using static FlexLLM.Benchmarks.PlanText;

namespace FlexLLM.Benchmarks;

/// <summary>
/// A model of the paper's evaluation with a sample of 8,192 tokens: what the released code allocates on a GPU, by operator, beside
/// what a job of this library holds, with a budget where that would be more than the share asked for.
/// </summary>
internal sealed class LongSample
{
    /// <summary>Share of the released code's bytes that ours may take.</summary>
    public const double ShareMax = 0.6;

    private const int Tokens = 8192;

    private readonly List<Row> _rows = [];

    private LongSample(string shape, int ranks, double releasedGigabytes)
    {
        (Shape, ReleasedBytes) = (shape, (long)(releasedGigabytes * 1e9));
        Job = new PlannedJob
        {
            Model = ModelShapes.Of(shape),
            Method = new LoraConfig { Rank = 16, TargetModules = ["down_proj"] },
            Tokens = Tokens,
            Ranks = ranks,
        };
        Plan = ActivationPlan.Of(Job);
        Final = Plan.Within((long)(ShareMax * ReleasedBytes), withAdapter: true);
        FillRows();
    }

    public string Shape { get; }

    public PlannedJob Job { get; }

    public ActivationPlan Plan { get; }

    /// <summary>Within the share.</summary>
    public ActivationStage Final { get; }

    /// <summary>What the released code allocates, as published.</summary>
    public long ReleasedBytes { get; }

    /// <summary>The same from the formula of its operators.</summary>
    public long ReleasedBytesByOperator => _rows.Sum(r => r.Released);

    public long Bytes => Final.Bytes + Plan.AdapterBytes;

    /// <summary>Ours without a budget: no linear is computed again.</summary>
    public long BytesWithoutBudget => Plan.TokenLevel.Bytes + Plan.AdapterBytes;

    /// <summary>Arithmetic that the budget adds to a step, as a share of it.</summary>
    public double BudgetFlopsShare => (Final.RecomputedFlops - Plan.TokenLevel.RecomputedFlops) / Plan.StepFlops;

    public static IReadOnlyList<LongSample> All() =>
        [new("llama-3.1-8b", 1, 37.6), new("qwen2.5-14b", 2, 34.1), new("qwen2.5-32b", 4, 39.0)];

    public void Print(TextWriter output)
    {
        output.WriteLine();
        output.WriteLine(Invariant(
            $"{Shape}, {Job.Ranks} GPU{(Job.Ranks == 1 ? "" : "s")}: released code {ReleasedBytes / 1e9:0.0}, ours {Bytes / 1e9:0.00} = ") +
            $"{Percent((double)Bytes / ReleasedBytes)}, gradients exact");
        output.WriteLine(Final.Forced.Count == 0
            ? "  no linear is computed again"
            : Invariant($"  without a budget {BytesWithoutBudget / 1e9:0.00} = {Percent((double)BytesWithoutBudget / ReleasedBytes)}; ") +
                $"not kept are {Layers(Final.Forced)}, for {Percent(BudgetFlopsShare)} more arithmetic a step");
        output.WriteLine(Invariant($"  {"",-32}{"released",10}{"ours",10}  why"));
        foreach (Row row in _rows)
        {
            output.WriteLine(Invariant($"  {row.Name,-32}{row.Released / 1e9,10:0.000}{row.Ours / 1e9,10:0.000}  {row.Reason}").TrimEnd());
        }

        output.WriteLine(Invariant($"  {"together",-32}{ReleasedBytesByOperator / 1e9,10:0.000}{Bytes / 1e9,10:0.000}"));
    }

    public void Write(Utf8JsonWriter json)
    {
        json.WriteStartObject();
        json.WriteString("shape", Shape);
        json.WriteNumber("ranks", Job.Ranks);
        json.WriteNumber("tokens", Tokens);
        json.WriteNumber("released_bytes", ReleasedBytes);
        json.WriteNumber("bytes", Bytes);
        json.WriteNumber("share", (double)Bytes / ReleasedBytes);
        json.WriteNumber("bytes_without_budget", BytesWithoutBudget);
        json.WriteNumber("budget_flops_share", BudgetFlopsShare);
        json.WriteStartArray("rows");
        foreach (Row row in _rows)
        {
            json.WriteStartObject();
            json.WriteString("name", row.Name);
            json.WriteNumber("released_bytes", row.Released);
            json.WriteNumber("bytes", row.Ours);
            json.WriteString("reason", row.Reason);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteEndObject();
    }

    // Of a layer and token the released code allocates, in fp16 but where said; a rank has its share where operators are divided.
    private void FillRows()
    {
        ModelConfig local = Job.LocalModel;
        long query = (long)local.AttentionHeads * local.HeadDim;
        long kv = (long)local.KeyValueHeads * local.HeadDim;
        long inner = local.IntermediateSize;
        long hidden = local.HiddenSize;
        const int Rank = 16;
        const int Half = 2;
        const int Single = 4;

        Add("keys and values", 2 * kv * Half, Ours(ActivationUse.KeysAndValues), "");
        Add("queries", query * Half, Kept("q_rope"), "not of layer 0, where the backward pass ends at the adapter");
        Add("attention output", query * Half, 0, "its gradient needs a row sum that attention's own gradient has anyway");
        Add("log-sum-exp", local.AttentionHeads * Single, Kept("lse"), "");
        Add("scratch of the inverse rotation", (query + kv) / 2 * 8, 0, "rotated in place");
        Add("input of down_proj, and x A", (inner + Rank) * Half, Kept("act"), "computed again from gate and up but in layer 0");
        Add("gate and up", 2 * inner * Half, Kept("gate", "up"), Final.Forced.Count == 0 ? "" : "the budget");
        Add("inputs of both norms", 2 * hidden * Half, Kept("input", "middle"), "not of layer 0");
        Add("positions", 12, 0, "known from the row");
        Add("gradients in flight", 0, Ours(ActivationUse.Gradients), "the released figure leaves them out");
        Add("workspace", 0, Ours(ActivationUse.Workspace), "likewise");
        Add("logits", 0, Ours(ActivationUse.Loss), Invariant(
            $"likewise; the released code keeps {2L * Tokens * local.VocabularySize / 1e9:0.0} GB of probabilities besides"));
        Add("adapter, gradients, optimizer", 0, Plan.AdapterBytes, "likewise; F32 weights, gradients and two moments here");
        Check.That(_rows.Sum(r => r.Ours) == Bytes);

        void Add(string name, long releasedPerTokenAndLayer, long ours, string reason) =>
            _rows.Add(new Row(name, releasedPerTokenAndLayer * Tokens * local.LayerCount, ours, reason));

        long Ours(ActivationUse use) => Final.BytesOf(use);

        long Kept(params string[] names) =>
            Final.Rows.Where(r => r.Use == ActivationUse.Kept && names.Contains(r.Name)).Sum(r => r.Bytes);
    }

    private readonly record struct Row(string Name, long Released, long Ours, string Reason);
}
