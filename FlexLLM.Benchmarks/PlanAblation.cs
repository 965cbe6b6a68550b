using System.Text.Json;
using FlexLLM.Finetuning;
using FlexLLM.Models;
using static FlexLLM.Benchmarks.PlanText;

namespace FlexLLM.Benchmarks;

/// <summary>One model and method of the paper's ablation: ours pass by pass beside the paper's bytes.</summary>
/// <param name="Shape">Name of the model's shape.</param>
/// <param name="Job">The job.</param>
/// <param name="Plan">Ours.</param>
/// <param name="Budgeted">Ours under the budget that saves as much as the paper and holds no more.</param>
/// <param name="Paper">The paper's.</param>
internal sealed record AblationCase(
    string Shape, PlannedJob Job, ActivationPlan Plan, ActivationStage Budgeted, PaperAblation Paper)
{
    public IEnumerable<ActivationStage> Stages => [.. Plan.Stages, Budgeted];

    /// <summary>Share of the unoptimized bytes that a stage does without.</summary>
    public double Saved(ActivationStage stage) => 1 - ((double)stage.Bytes / Plan.Unoptimized.Bytes);

    /// <summary>Bytes of a stage, or of some uses in it, in hidden vectors a layer and token.</summary>
    public string H(ActivationStage stage, params ActivationUse[] uses) =>
        H(uses.Length == 0 ? stage.Bytes : uses.Sum(stage.BytesOf));

    /// <summary>Arithmetic that a stage adds to a step, as a share of it.</summary>
    public double Again(ActivationStage stage) => stage.RecomputedFlops / Plan.StepFlops;

    /// <summary>The paper's bytes of a stage; the last stands beside its last.</summary>
    public long PaperBytes(int stage) => Paper.Bytes[Math.Min(stage, Paper.Bytes.Length - 1)];

    public string PaperH(int stage) => H(PaperBytes(stage));

    public double PaperSaved(int stage) => 1 - ((double)PaperBytes(stage) / Paper.Bytes[0]);

    private string H(long bytes) =>
        Invariant($"{bytes / ((double)Job.ElementBytes * Job.Tokens * Job.Model.LayerCount * Job.Model.HiddenSize):0.00}");
}

/// <summary>Bytes of one method in the paper's ablation, from its plotting script, and the share that must be saved in the end.</summary>
/// <param name="Name">The method.</param>
/// <param name="Method">The same here.</param>
/// <param name="Bytes">Unoptimized, with pruning, with rematerialization, with token-level finetuning.</param>
/// <param name="SavedMin">What ours must save at least, as a share.</param>
/// <param name="Reasons">Why ours differ, a sentence a stage.</param>
internal sealed record PaperAblation(
    string Name, PeftConfig Method, long[] Bytes, double SavedMin, Func<AblationCase, string>[] Reasons);

/// <summary>
/// `plan --ablation`: the paper's ablation (70B, 1,024 tokens) and the released code's memory a GPU (8,192 tokens), recomputed with
/// the compiler of this library.
/// </summary>
internal sealed class PlanAblation
{
    private const int ElementBytes = 2;
    private static readonly string[] Shapes = ["llama-70b-4h", "llama-3.1-70b"];

    private static readonly PaperAblation[] Paper =
    [
        new(
            "LoRA", new LoraConfig { Rank = 16, TargetModules = ["down_proj"] },
            [84_557_168_640, 21_474_836_480, 16_106_127_360, 12_499_025_920], 0.85,
            [
                c => Invariant($"all results of a layer, attention probabilities among them, and gradients of the same size come to ") +
                    Invariant($"{c.H(c.Plan.Unoptimized, ActivationUse.Kept, ActivationUse.Gradients)} H; logits are the rest"),
                c => Invariant($"kept are act, gate, up, queries and both norm inputs, {c.H(c.Plan.Pruned, ActivationUse.Kept)} H; ") +
                    Invariant($"keys and values {c.H(c.Plan.Pruned, ActivationUse.KeysAndValues)} H; what is in progress is the rest"),
                _ => "act comes back from gate and up, as in the paper; layer 0 keeps act, since there gate and up are not read",
                c => "windows shrink workspace and logits alone: an exact gradient reads gate, up, queries, keys, values and both norm " +
                    Invariant($"inputs, {c.H(c.Plan.TokenLevel, ActivationUse.Kept, ActivationUse.KeysAndValues)} H, or computes ") +
                    Invariant($"linears again; the paper does not say how it has {c.PaperH(3)} H"),
                Budget,
            ]),
        new(
            "Adapter", new SerialAdapterConfig { TargetModules = ["down_proj"] },
            [84_557_168_640, 21_474_836_480, 21_474_836_480, 12_834_570_240], 0.85,
            [
                _ => "one operator more than LoRA has: the bias after the second matrix, H wide",
                _ => "it reads the output of down_proj, H wide, so nothing reads the input, act: pruning frees it; the paper keeps as " +
                    "much as for LoRA",
                _ => "nothing large is left that is cheap, here or in the paper; results inside of the adapter come back from its input",
                _ => "as for LoRA, and the output of down_proj is kept too",
                Budget,
            ]),
        new(
            "(IA)^3", new Ia3Config(), [97_978_941_440, 28_185_722_880, 20_132_659_200, 12_750_684_160], 0.87,
            [
                _ => "scaling is an operator and its add another here: keys, values and act stand there three times",
                _ => "its gradient reads act, keys and values before they are scaled, and nothing reads the scaled act: little more " +
                    "than for LoRA, where the paper keeps 5 H more",
                _ => "act comes back from gate and up; keys and values before their scaling stay",
                _ => "as for LoRA",
                Budget,
            ]),
    ];

    private PlanAblation(IReadOnlyList<AblationCase> cases, IReadOnlyList<LongSample> samples) => (Cases, Samples) = (cases, samples);

    public IReadOnlyList<AblationCase> Cases { get; }

    public IReadOnlyList<LongSample> Samples { get; }

    public static PlanAblation Compute() => new(
        [.. Shapes.SelectMany(shape => Paper.Select(paper => Case(shape, paper)))],
        LongSample.All());

    public void Print(TextWriter output)
    {
        output.WriteLine(
            "activations of a sample of 1,024 tokens, 2 bytes an element; GB are 1e9 bytes, H a hidden vector a layer and token;");
        output.WriteLine("again: arithmetic of the forward pass that the backward pass repeats, as a share of a step");
        foreach (AblationCase c in Cases)
        {
            Print(output, c);
        }

        output.WriteLine();
        output.WriteLine("all that a job holds for a sample of 8,192 tokens, LoRA rank 16 on down_proj, AdamW, windows of 256; GB a GPU");
        foreach (LongSample sample in Samples)
        {
            sample.Print(output);
        }
    }

    public void Write(Utf8JsonWriter json)
    {
        json.WriteStartObject();
        json.WriteStartArray("ablation");
        foreach (AblationCase c in Cases)
        {
            json.WriteStartObject();
            json.WriteString("shape", c.Shape);
            json.WriteString("method", c.Job.Method.Describe());
            json.WriteNumber("tokens", c.Job.Tokens);
            json.WriteStartArray("stages");
            foreach ((int index, ActivationStage stage) in c.Stages.Index())
            {
                json.WriteStartObject();
                json.WriteString("stage", stage.Name);
                json.WriteString("definition", stage.Definition);
                json.WriteNumber("bytes", stage.Bytes);
                json.WriteNumber("saved_share", c.Saved(stage));
                json.WriteNumber("recomputed_share_of_step", c.Again(stage));
                json.WriteNumber("paper_bytes", c.PaperBytes(index));
                json.WriteNumber("paper_saved_share", c.PaperSaved(index));
                json.WriteString("reason", c.Paper.Reasons[index](c));
                json.WriteEndObject();
            }

            json.WriteEndArray();
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteStartArray("long_samples");
        foreach (LongSample sample in Samples)
        {
            sample.Write(json);
        }

        json.WriteEndArray();
        json.WriteEndObject();
    }

    private static AblationCase Case(string shape, PaperAblation paper)
    {
        var job = new PlannedJob { Model = ModelShapes.Of(shape), Method = paper.Method, ElementBytes = ElementBytes };
        ActivationPlan plan = ActivationPlan.Of(job);
        double saved = Math.Max(paper.SavedMin, 1 - ((double)paper.Bytes[^1] / paper.Bytes[0]));
        long most = Math.Min(paper.Bytes[^1], (long)((1 - saved) * plan.Unoptimized.Bytes));
        return new AblationCase(shape, job, plan, plan.Within(most), paper);
    }

    private static void Print(TextWriter output, AblationCase c)
    {
        output.WriteLine();
        output.WriteLine($"{c.Shape}, {c.Job.Method.Describe()}");
        output.WriteLine(Invariant(
            $"  {"",-20}{"GB",9}{"H",8}{"saved",9}{"again",9}{"paper GB",12}{"H",8}{"saved",9}"));
        foreach ((int index, ActivationStage stage) in c.Stages.Index())
        {
            output.WriteLine(Invariant(
                $"  {stage.Name,-20}{stage.Bytes / 1e9,9:0.000}{c.H(stage),8}{Percent(c.Saved(stage)),9}{Percent(c.Again(stage)),9}") +
                Invariant($"{c.PaperBytes(index) / 1e9,12:0.000}{c.PaperH(index),8}{Percent(c.PaperSaved(index)),9}"));
        }

        if (c.Shape != Shapes[0])
        {
            output.WriteLine("  differences: as above, and an MLP of 3.5 H instead of 4 H");
            return;
        }

        foreach ((int index, ActivationStage stage) in c.Stages.Index())
        {
            output.WriteLine($"  {stage.Name}: {c.Paper.Reasons[index](c)}");
        }
    }

    private static string Budget(AblationCase c) =>
        $"the target is the paper's bytes and its share; not kept are {Layers(c.Budgeted.Forced)}, for " +
        $"{Percent(c.Again(c.Budgeted) - c.Again(c.Plan.TokenLevel))} more arithmetic a step";
}
