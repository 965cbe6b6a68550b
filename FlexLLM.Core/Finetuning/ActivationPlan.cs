using System.Globalization;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Models;

namespace FlexLLM.Finetuning;

/// <summary>What bytes of a stage are for.</summary>
internal enum ActivationUse
{
    /// <summary>Kept from the forward pass to the backward pass.</summary>
    Kept,

    /// <summary>Keys and values of the sample, which the forward pass needs anyway.</summary>
    KeysAndValues,

    /// <summary>Gradients of activations.</summary>
    Gradients,

    /// <summary>What the layer in progress works in, forward and backward.</summary>
    Workspace,

    /// <summary>Logits and their gradient.</summary>
    Loss,
}

/// <summary>Bytes of one value, or of one buffer, for the whole sample.</summary>
internal readonly record struct ActivationRow(ActivationUse Use, string Name, long Bytes);

/// <summary>What a job holds when the compiler has done so much and no more.</summary>
/// <param name="Name">Short name.</param>
/// <param name="Definition">What is counted.</param>
/// <param name="Rows">All of it.</param>
/// <param name="RecomputedFlops">Flops per token of what the backward pass computes again.</param>
internal sealed record ActivationStage(string Name, string Definition, IReadOnlyList<ActivationRow> Rows, double RecomputedFlops)
{
    public long Bytes => Rows.Sum(r => r.Bytes);

    public long BytesOf(ActivationUse use) => Rows.Where(r => r.Use == use).Sum(r => r.Bytes);

    /// <summary>What the budget had the backward pass compute again; empty where there is none.</summary>
    public IReadOnlyList<RoleSum> Forced { get; init; } = [];
}

/// <summary>
/// The paper's ablation (section 5.2 and 6.1) for any job: bytes of activations of one rank, pass by pass, computed from the
/// compiled graph alone. It counts what an ideal allocator would hold; a backend's padding and scratch memory come on top.
/// </summary>
internal sealed class ActivationPlan
{
    /// <summary>Rows whose logits exist at once in the fused loss.</summary>
    public const int LossRows = 48;

    private const int AttemptsMax = 8;

    // What row-parallel linears leave: partial sums, until the ranks have added theirs.
    private static readonly string[] SummedRoles = ["o", "o.base", "down", "down.base"];

    // Sums over tokens are kept in full width whatever elements are.
    private const int AccumulatorBytes = sizeof(float);

    private readonly PlannedJob _job;
    private readonly ModelConfig _model;
    private readonly GraphCompiler _compiler;
    private readonly ParallelGraph _graph;
    private readonly Compiled _standard;

    private ActivationPlan(PlannedJob job)
    {
        _job = job;
        _model = job.LocalModel;
        _compiler = new GraphCompiler(DecoderBuilder.BuildServing(_model), _model.LayerCount);
        _graph = job.BuildGraph();
        _standard = Compile(Options(dropsCheap: true));
        ParallelGraph pruned = Passes.Single(p => p.Pass == "prune").Graph;
        StepFlops = LossFlops + pruned.Nodes.Where(n => n.Op is not (OpKind.Logits or OpKind.CrossEntropy))
            .Sum(n => OpCosts.FlopsOf(pruned, n, job.Tokens));
        Unoptimized = OfUnoptimized();
        Compiled whole = Compile(Options(dropsCheap: false));
        Pruned = OfWholeSample("graph pruning", "what a remaining gradient reads, all layers", whole, whole.After("prune").Kept);
        Rematerialized = OfWholeSample(
            "rematerialization", "the same without what is cheap to compute again, the rest compressed", _standard, _standard.Kept);
        TokenLevel = OfTokenLevel(
            "token-level", Invariant($"the same, workspace for windows of {Window} rows, logits of {LossRows} rows at a time"),
            _standard);
    }

    /// <summary>The graph after each pass.</summary>
    public IReadOnlyList<PassResult> Passes => _standard.Passes;

    /// <summary>What each pass keeps, frees and has computed again.</summary>
    public IReadOnlyList<PassReport> Reports => _standard.Reports;

    /// <summary>Flops per token of forward and backward pass and the loss, nothing computed again.</summary>
    public double StepFlops { get; }

    /// <summary>What a trainer holds that gives every tensor of its graph memory for itself and for its gradient.</summary>
    public ActivationStage Unoptimized { get; }

    /// <summary>After graph pruning, whole samples at a time.</summary>
    public ActivationStage Pruned { get; }

    /// <summary>After rematerialization and compression as well.</summary>
    public ActivationStage Rematerialized { get; }

    /// <summary>In windows as well: what this library holds.</summary>
    public ActivationStage TokenLevel { get; }

    /// <summary>Every stage that needs no budget, in order.</summary>
    public IReadOnlyList<ActivationStage> Stages => [Unoptimized, Pruned, Rematerialized, TokenLevel];

    /// <summary>Weights of the adapter, their gradients and the optimizer's state on one rank: all in F32.</summary>
    public long AdapterBytes => Parameters * (2L + _job.Moments) * sizeof(float);

    /// <summary>Trainable elements on one rank, where every network takes the plan that sends nothing (C1 and R1).</summary>
    public long Parameters => PeftAdapter.NetworksOf(_job.Method, _job.Model).Sum(site =>
    {
        (int tap, int add) = AdapterSites.WidthsOf(AdapterSites.ModuleOf(site.Key), site.Value.Attachment, _model);
        return site.Value.Weights(tap, add).Sum(w => w.Count);
    });

    private int Window => Math.Min(_job.Window, _job.Tokens);

    private long KvColumns => (long)_model.KeyValueHeads * _model.HeadDim;

    // Logits, and the gradient of what they were made of.
    private double LossFlops => 4.0 * _model.HiddenSize * _model.VocabularySize;

    /// <summary>Compiles a job and counts.</summary>
    /// <exception cref="RequestRejectedException">There is no such job.</exception>
    public static ActivationPlan Of(PlannedJob job)
    {
        job.Validate();
        return new ActivationPlan(job);
    }

    /// <summary>
    /// Token-level, and of the linears and attention so much computed again that activations stay within a budget; those first
    /// that free most for their arithmetic. Gradients stay exact.
    /// </summary>
    /// <param name="bytesMax">Bytes for activations.</param>
    /// <param name="withAdapter">The budget is for the adapter, its gradients and the optimizer too.</param>
    /// <exception cref="RequestRejectedException">Less than the least possible; the message says what would fit.</exception>
    public ActivationStage Within(long bytesMax, bool withAdapter = false)
    {
        long besides = withAdapter ? AdapterBytes : 0;
        long most = bytesMax - besides;
        long columns = _standard.SavedColumns;
        long columnBytes = (long)_job.ElementBytes * _job.Tokens;
        ActivationStage stage = TokenLevel;
        ActivationStage least = stage;
        for (int attempt = 0; stage.Bytes > most; attempt++)
        {
            if (columns == 0)
            {
                throw TooLittle(bytesMax, besides, least);
            }

            // The pass counts elements, a budget bytes: the next attempt does without what this one is over. Where that helps
            // little, since the backward workspace grows instead, larger steps come to an end.
            long over = (stage.Bytes - most + columnBytes - 1) / columnBytes;
            columns = Math.Max(0, columns - Math.Max(over, attempt < AttemptsMax ? 1 : 1 + (columns / 4)));
            (stage, long saved) = Under(columns);
            columns = saved <= columns ? saved : 0; // More than asked for: there is no more to do without.
            least = stage.Bytes < least.Bytes ? stage : least;
        }

        return stage;
    }

    private (ActivationStage Stage, long SavedColumns) Under(long columns)
    {
        CompilerOptions options = Options(dropsCheap: true);
        Compiled compiled = Compile(options with
        {
            Rematerialization = options.Rematerialization with { SavedColumnsMax = columns },
        });
        ActivationStage stage = OfTokenLevel("byte budget", "the same, linears or attention of some layers computed again", compiled);
        return (stage with { Forced = PassReport.Minus(_standard.Kept, compiled.Kept) }, compiled.SavedColumns);
    }

    private RequestRejectedException TooLittle(long bytesMax, long besides, ActivationStage least)
    {
        // What is kept grows with the sample, the workspace with the window; logits are those of a few rows.
        long workspace = least.BytesOf(ActivationUse.Workspace);
        long loss = least.BytesOf(ActivationUse.Loss);
        long sample = least.Bytes - workspace - loss;
        long tokens = (long)((bytesMax - besides - workspace - loss) / ((double)sample / _job.Tokens));
        tokens = tokens / DeviceKvCache.TokensPerBlock * DeviceKvCache.TokensPerBlock;
        long rows = (long)((bytesMax - besides - sample - loss) / ((double)workspace / Window));
        string advice = bytesMax <= besides ? "Fewer modules or a lower rank need less"
            : tokens >= Window ? $"A sample of {tokens} tokens would fit"
            : rows >= LossRows ? $"Windows of {rows} rows would fit"
            : "Shorter samples in smaller windows need less";
        return new RequestRejectedException(
            Invariant($"A budget of {bytesMax / 1e9:0.000} GB cannot hold the job: with everything computed again that can be, ") +
            Invariant($"activations for {_job.Tokens} tokens in windows of {Window} need {least.Bytes / 1e9:0.000} GB") +
            (besides == 0 ? "" : Invariant($", adapter, gradients and optimizer {besides / 1e9:0.000} GB")) +
            Invariant($", together {(least.Bytes + besides) / 1e9:0.000} GB. {advice}."));
    }

    private CompilerOptions Options(bool dropsCheap) => new()
    {
        Rematerialization = new RematerializationOptions
        {
            DropsCheap = dropsCheap,
            SequenceTokens = _job.Tokens,
            SummedRoles = new HashSet<string>(_job.Ranks > 1 ? SummedRoles : []),
        },
        Compresses = dropsCheap,
        StoresSavedAsBF16 = dropsCheap && _job.StoresSavedAsBF16,
    };

    private Compiled Compile(CompilerOptions options)
    {
        PassResult[] passes = [.. GraphCompiler.Passes(_graph, options)];
        return new Compiled(passes, PassReport.Of(passes, _job.Tokens), _compiler.LowerTraining(passes[^1].Graph));
    }

    private ActivationStage OfUnoptimized()
    {
        // Attention keeps its probabilities, not the log-sum-exp that stands for them.
        RoleSum[] values =
        [
            .. PassReport.ForwardActivations(_graph).Where(r => !r.Is32Bit),
            new("attention probabilities", _model.LayerCount, checked(_model.AttentionHeads * _job.Tokens), false),
            .. _graph.Nodes.Where(n => n.Layer < 0 && n.Op == OpKind.RmsNorm)
                .SelectMany(n => new[] { n.Inputs[0], n.Outputs[0] }).Select(v => _graph.Values[v])
                .Select(v => new RoleSum(v.Name, 1, v.Columns, false)),
        ];
        return new ActivationStage(
            "unoptimized", "every tensor of every layer and a gradient of its size, attention probabilities included",
            [
                .. values.Select(v => Sample(ActivationUse.Kept, v)),
                new(ActivationUse.Gradients, "of every tensor", values.Sum(v => v.Bytes(_job.ElementBytes)) * _job.Tokens),
                Logits(_job.Tokens),
            ],
            0);
    }

    private ActivationStage OfWholeSample(string name, string definition, Compiled job, IReadOnlyList<RoleSum> kept) => new(
        name, definition, [.. Held(job, kept), .. InProgress(job.Program, _job.Tokens, _job.Tokens)], job.RecomputedFlops);

    private ActivationStage OfTokenLevel(string name, string definition, Compiled job) => new(
        name, definition, [.. Held(job, job.Kept), .. InProgress(job.Program, Window, Math.Min(LossRows, Window))], job.RecomputedFlops);

    private IEnumerable<ActivationRow> Held(Compiled job, IReadOnlyList<RoleSum> kept)
    {
        int tokens = (_job.Tokens + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock * DeviceKvCache.TokensPerBlock;
        return kept.Where(r => !job.IsCached(r)).Select(r => Sample(ActivationUse.Kept, r)).Append(new ActivationRow(
            ActivationUse.KeysAndValues, "of all layers", 2 * KvColumns * _model.LayerCount * tokens * _job.ElementBytes));
    }

    private IEnumerable<ActivationRow> InProgress(TrainingProgram program, int rows, int lossRows) =>
    [
        new(ActivationUse.Gradients, "between two layers", (long)_model.HiddenSize * _job.Tokens * _job.ElementBytes),
        new(ActivationUse.Gradients, "of keys and values of a layer", 2 * KvColumns * _job.Tokens * AccumulatorBytes),
        new(ActivationUse.Workspace, "forward", (long)_compiler.Forward.Arena.Columns * rows * _job.ElementBytes),
        new(ActivationUse.Workspace, "backward", (long)program.Arena.Columns * rows * _job.ElementBytes),
        Logits(lossRows),
    ];

    private ActivationRow Logits(int rows) => new(
        ActivationUse.Loss, "logits and their gradient", 2L * rows * _model.VocabularySize * _job.ElementBytes);

    private ActivationRow Sample(ActivationUse use, RoleSum values) =>
        new(use, values.Role, values.Bytes(_job.ElementBytes) * _job.Tokens);

    private static string Invariant(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);

    /// <summary>The job's graph after each pass of one set of options, and the program lowered from the last.</summary>
    private sealed record Compiled(IReadOnlyList<PassResult> Passes, IReadOnlyList<PassReport> Reports, TrainingProgram Program)
    {
        private readonly HashSet<string> _cached =
            [.. Program.Graph.CachedValues().Select(v => PassReport.RoleOf(Program.Graph.Values[v].Name))];

        /// <summary>What the backward program reads of the forward pass.</summary>
        public IReadOnlyList<RoleSum> Kept => Reports[^1].Kept;

        /// <summary>What the budget of rematerialization counts.</summary>
        public long SavedColumns => After("rematerialize").Kept.Where(r => !IsCached(r)).Sum(r => r.ColumnsTotal);

        // Fusion hides arithmetic inside its nodes.
        public double RecomputedFlops => After("rematerialize").RecomputedFlops;

        public PassReport After(string pass) => Reports.Single(r => r.Pass == pass);

        /// <summary>Does the KV cache of the sample hold it anyway?</summary>
        public bool IsCached(RoleSum values) => _cached.Contains(values.Role);
    }
}
