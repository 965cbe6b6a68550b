using System.Text.Json;
using FlexLLM.Finetuning;
using FlexLLM.Graph;
using FlexLLM.Graph.Parallelization;
using static FlexLLM.Benchmarks.PlanText;

namespace FlexLLM.Benchmarks;

/// <summary>
/// A planned job as text and as JSON. GB are 1e9 bytes, MB, for small models, 1e6; all bytes are those of one rank.
/// </summary>
internal sealed class PlanOutput(PlannedJob job, ActivationPlan plan, ActivationStage? budgeted, TimeSpan compileTime)
{
    /// <summary>Searches for parallel plans, with the modules that each holds for.</summary>
    public required IReadOnlyList<(string Modules, Planning Planning)> Plannings { get; init; }

    private (string Name, double Bytes) Unit => plan.Unoptimized.Bytes < 1_000_000_000 ? ("MB", 1e6) : ("GB", 1e9);

    private ActivationStage Final => budgeted ?? plan.TokenLevel;

    private IReadOnlyList<ActivationStage> Stages =>
        budgeted is null || budgeted == plan.TokenLevel ? plan.Stages : [.. plan.Stages, budgeted];

    public void Print(TextWriter output)
    {
        ModelConfig model = job.Model;
        output.WriteLine(Invariant(
            $"{model.Architecture}: {model.LayerCount} layers, hidden {model.HiddenSize}, inner {model.IntermediateSize}, ") + Invariant(
            $"{model.AttentionHeads} query and {model.KeyValueHeads} key/value heads of {model.HeadDim}, vocabulary ") + Invariant(
            $"{model.VocabularySize}"));
        output.WriteLine(Invariant(
            $"{job.Method.Describe()}; a sample of {job.Tokens} tokens in windows of {Math.Min(job.Window, job.Tokens)}; ") + Invariant(
            $"{job.ElementBytes} bytes an element; {Ranks(job.Ranks)}"));
        output.WriteLine(Invariant($"compiled, every stage, in {compileTime.TotalMilliseconds:0} ms"));
        foreach (PassReport pass in plan.Reports)
        {
            output.WriteLine();
            PrintPass(output, pass);
        }

        output.WriteLine();
        PrintStages(output);
        foreach ((string modules, Planning planning) in Plannings)
        {
            output.WriteLine();
            output.WriteLine($"parallel plans at {modules}");
            output.Write(PlanReport.Print(planning));
        }
    }

    private void PrintPass(TextWriter output, PassReport pass)
    {
        output.WriteLine(Invariant($"pass {pass.Pass}: {pass.ForwardNodes} forward and {pass.BackwardNodes} backward operations"));
        output.WriteLine(Invariant($"  {"kept",-28}{"layers",8}{"bytes/token/layer",19}{"bytes/token",14}{Unit.Name,10}"));
        foreach (RoleSum role in pass.Kept)
        {
            output.WriteLine(Row(role.Role, role.Layers, role.BytesPerLayer(job.ElementBytes), role.Bytes(job.ElementBytes)));
        }

        long bytes = pass.KeptBytes(job.ElementBytes);
        output.WriteLine(Row("together", job.Model.LayerCount, bytes / job.Model.LayerCount, bytes));
        PrintRoles(output, "freed", pass.Freed);
        PrintRoles(output, "computed again", pass.Recomputed);
        if (pass.RecomputedFlops > 0)
        {
            output.WriteLine(Invariant(
                $"  {"",-28}{pass.RecomputedFlops / 1e6:N3} Mflop a token, {Percent(pass.RecomputedFlops / plan.StepFlops)} of a step"));
        }

        if (pass.Pass == "fuse" && job.Method is LoraConfig)
        {
            output.WriteLine("  a fused network computes x A^T again inside of it");
        }

        string Row(string name, int layers, long perLayer, long total) =>
            Invariant($"  {name,-28}{layers,8}{perLayer,19:N0}{total,14:N0}{total * job.Tokens / Unit.Bytes,10:0.000}");
    }

    private void PrintRoles(TextWriter output, string title, IReadOnlyList<RoleSum> roles)
    {
        if (roles.Count > 0)
        {
            string total = Invariant($"{roles.Sum(r => r.Bytes(job.ElementBytes)):N0} bytes a token");
            output.WriteLine($"  {title}, {total}: {Layers(roles)}");
        }
    }

    private void PrintStages(TextWriter output)
    {
        output.WriteLine(Invariant($"activations of one rank for {job.Tokens} tokens, {Unit.Name}"));
        output.WriteLine($"  {"",-32}{string.Concat(Stages.Select(s => $"{s.Name,19}"))}");
        (ActivationUse Use, string Name)[] rows = [.. Stages.SelectMany(s => s.Rows).Select(r => (r.Use, r.Name)).Distinct()];
        foreach ((ActivationUse use, string name) in rows.OrderBy(r => r.Use))
        {
            IEnumerable<string> cells = Stages.Select(s => s.Rows.Any(r => r.Use == use && r.Name == name)
                ? Invariant($"{s.Rows.Where(r => r.Use == use && r.Name == name).Sum(r => r.Bytes) / Unit.Bytes,19:0.000}")
                : $"{"",19}");
            output.WriteLine($"  {Label(use, name),-32}{string.Concat(cells)}");
        }

        Line("together", s => Invariant($"{s.Bytes / Unit.Bytes:0.000}"));
        Line("saved", s => Percent(1 - ((double)s.Bytes / plan.Unoptimized.Bytes)));
        Line("bytes a token and layer", s => Invariant($"{s.Bytes / job.Tokens / job.Model.LayerCount:N0}"));
        Line("computed again, of a step's flops", s => Percent(s.RecomputedFlops / plan.StepFlops));
        foreach (ActivationStage stage in Stages)
        {
            output.WriteLine($"  {stage.Name}: {stage.Definition}");
        }

        if (budgeted is not null)
        {
            output.WriteLine(budgeted.Forced.Count == 0
                ? "  the budget holds without more arithmetic"
                : $"  the budget costs {Percent((budgeted.RecomputedFlops - plan.TokenLevel.RecomputedFlops) / plan.StepFlops)} more " +
                    $"arithmetic a step: not kept are {Layers(budgeted.Forced)}");
        }

        double adapter = plan.AdapterBytes / Unit.Bytes;
        output.WriteLine(Invariant(
            $"  adapter, gradients, optimizer: {plan.Parameters:N0} elements, {adapter:0.000} {Unit.Name}; with the activations ") +
            Invariant($"{adapter + (Final.Bytes / Unit.Bytes):0.000} {Unit.Name}"));

        void Line(string title, Func<ActivationStage, string> cell) =>
            output.WriteLine($"  {title,-32}{string.Concat(Stages.Select(s => $"{cell(s),19}"))}");
    }

    public void Write(Utf8JsonWriter json)
    {
        json.WriteStartObject();
        json.WriteString("architecture", job.Model.Architecture.ToString());
        json.WriteNumber("layers", job.Model.LayerCount);
        json.WriteNumber("hidden_size", job.Model.HiddenSize);
        json.WriteString("method", job.Method.Describe());
        json.WriteNumber("tokens", job.Tokens);
        json.WriteNumber("window", job.Window);
        json.WriteNumber("ranks", job.Ranks);
        json.WriteNumber("element_bytes", job.ElementBytes);
        json.WriteNumber("compile_ms", compileTime.TotalMilliseconds);
        json.WriteNumber("step_flops_per_token", plan.StepFlops);
        json.WriteStartArray("passes");
        foreach (PassReport pass in plan.Reports)
        {
            json.WriteStartObject();
            json.WriteString("pass", pass.Pass);
            json.WriteNumber("forward_operations", pass.ForwardNodes);
            json.WriteNumber("backward_operations", pass.BackwardNodes);
            json.WriteNumber("kept_bytes_per_token", pass.KeptBytes(job.ElementBytes));
            WriteRoles(json, "kept", pass.Kept);
            WriteRoles(json, "freed", pass.Freed);
            WriteRoles(json, "recomputed", pass.Recomputed);
            json.WriteNumber("recomputed_flops_per_token", pass.RecomputedFlops);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteStartArray("stages");
        foreach (ActivationStage stage in Stages)
        {
            WriteStage(json, stage);
        }

        json.WriteEndArray();
        json.WriteNumber("adapter_elements", plan.Parameters);
        json.WriteNumber("adapter_bytes", plan.AdapterBytes);
        json.WriteNumber("total_bytes", plan.AdapterBytes + Final.Bytes);
        json.WriteStartArray("parallel_plans");
        foreach ((string modules, Planning planning) in Plannings)
        {
            json.WriteStartObject();
            json.WriteString("modules", modules);
            json.WriteString("tap", planning.Tap.Name);
            json.WritePropertyName("plans");
            JsonSerializer.Serialize(json, PlanReport.Rows(planning));
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteEndObject();
    }

    private void WriteStage(Utf8JsonWriter json, ActivationStage stage)
    {
        json.WriteStartObject();
        json.WriteString("stage", stage.Name);
        json.WriteString("definition", stage.Definition);
        json.WriteNumber("bytes", stage.Bytes);
        json.WriteNumber("bytes_per_token_and_layer", stage.Bytes / job.Tokens / job.Model.LayerCount);
        json.WriteNumber("saved_share", 1 - ((double)stage.Bytes / plan.Unoptimized.Bytes));
        json.WriteNumber("recomputed_flops_per_token", stage.RecomputedFlops);
        WriteRoles(json, "not_kept_under_budget", stage.Forced);
        json.WriteStartArray("rows");
        foreach (ActivationRow row in stage.Rows)
        {
            json.WriteStartObject();
            json.WriteString("use", row.Use.ToString());
            json.WriteString("name", row.Name);
            json.WriteNumber("bytes", row.Bytes);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteEndObject();
    }

    private void WriteRoles(Utf8JsonWriter json, string name, IReadOnlyList<RoleSum> roles)
    {
        json.WriteStartArray(name);
        foreach (RoleSum role in roles)
        {
            json.WriteStartObject();
            json.WriteString("role", role.Role);
            json.WriteNumber("layers", role.Layers);
            json.WriteNumber("bytes_per_token_and_layer", role.BytesPerLayer(job.ElementBytes));
            json.WriteNumber("bytes", role.Bytes(job.ElementBytes) * job.Tokens);
            json.WriteEndObject();
        }

        json.WriteEndArray();
    }

    private static string Label(ActivationUse use, string name) => use switch
    {
        ActivationUse.Kept => name,
        ActivationUse.KeysAndValues => "keys and values",
        ActivationUse.Gradients => $"gradients {name}",
        ActivationUse.Workspace => $"{name} workspace",
        _ => name,
    };

    private static string Ranks(int ranks) => ranks == 1 ? "one rank" : $"{ranks} ranks";
}
