using System.Diagnostics;
using System.Text;
using System.Text.Json;
using FlexLLM.Finetuning;
using FlexLLM.Formats;
using FlexLLM.Graph;
using FlexLLM.Graph.Parallelization;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `plan`: what the compiler makes of a job, without weights: what each pass keeps, frees and computes again, bytes of activations
/// pass by pass, and the search for parallel plans. With --ablation the tables of the paper instead.
/// </summary>
internal static class PlanVerb
{
    public static string Usage { get; } =
        "--config FILE|--shape NAME [--method lora|adapter|ia3] [--rank 16] [--modules down_proj|all|NAME,NAME] [--tokens 1024] " +
        "[--window 256] [--ranks 1] [--bytes 2] [--budget 12.5GB] [--save-bf16] " +
        $"[--machine {string.Join('|', MachineModels.Names)}] [--layer N] [--dot FILE] [--json FILE], or --ablation [--json FILE]";

    public static int Run(string[] args) => Run(args, Console.Out);

    public static int Run(string[] args, TextWriter output)
    {
        if (CommandLine.TakeFlag(ref args, "--ablation"))
        {
            CommandLine.Allow(args, "--json");
            string? file = CommandLine.Text(args, "--json");
            PlanAblation ablation = PlanAblation.Compute();
            ablation.Print(output);
            SaveJson(file, ablation.Write);
            return 0;
        }

        bool storesBF16 = CommandLine.TakeFlag(ref args, "--save-bf16");
        CommandLine.Allow(
            args, "--config", "--shape", "--method", "--rank", "--modules", "--tokens", "--window", "--ranks", "--bytes",
            "--budget", "--machine", "--layer", "--dot", "--json");
        ModelConfig model = ModelOf(args);
        var job = new PlannedJob
        {
            Model = model,
            Method = MethodOf(args),
            Tokens = CommandLine.Int(args, "--tokens", Math.Min(1024, model.MaxPositions)),
            Window = CommandLine.Int(args, "--window", 256),
            Ranks = CommandLine.Int(args, "--ranks", 1),
            ElementBytes = CommandLine.Int(args, "--bytes", 2),
            StoresSavedAsBF16 = storesBF16,
        };
        MachineModel machine = MachineModels.Of(CommandLine.Text(args, "--machine") ?? "a100", job.ElementBytes);
        int layer = CommandLine.Int(args, "--layer", model.LayerCount / 2, min: 0);
        if (layer >= model.LayerCount)
        {
            throw new ArgumentException($"--layer: {layer}; the model has layers 0 to {model.LayerCount - 1}.");
        }

        long? budget = CommandLine.Bytes(args, "--budget");
        (string? dot, string? json) = (CommandLine.Text(args, "--dot"), CommandLine.Text(args, "--json"));
        var watch = Stopwatch.StartNew();
        ActivationPlan plan = ActivationPlan.Of(job);
        TimeSpan compileTime = watch.Elapsed;
        ActivationStage? budgeted = budget is null ? null : plan.Within(budget.Value, withAdapter: true);
        var report = new PlanOutput(job, plan, budgeted, compileTime)
        {
            Plannings = job.Ranks > 1 ? [.. job.PlanBypasses(machine)] : [],
        };
        report.Print(output);
        if (dot is not null)
        {
            string picture = GraphPicture.Dot(plan.Passes[^1].Graph, layer);
            AtomicFile.Write(dot, stream => stream.Write(Encoding.UTF8.GetBytes(picture)));
        }

        SaveJson(json, report.Write);
        return 0;
    }

    private static ModelConfig ModelOf(string[] args) =>
        (CommandLine.Text(args, "--config"), CommandLine.Text(args, "--shape")) switch
        {
            (string file, null) => ModelConfig.Load(file),
            (null, string name) => ModelShapes.Of(name),
            _ => throw new ArgumentException(
                $"Give either --config FILE or --shape NAME; shapes are {string.Join(", ", ModelShapes.Names)}."),
        };

    private static PeftConfig MethodOf(string[] args)
    {
        string method = CommandLine.Text(args, "--method") ?? "lora";
        int rank = CommandLine.Int(args, "--rank", 16);
        IReadOnlyList<string>? modules = CommandLine.Text(args, "--modules") switch
        {
            null => null,
            "all" => AdapterSites.ModuleNames,
            string names => names.Split(','),
        };
        switch (method)
        {
            case "lora":
                return new LoraConfig { Rank = rank, TargetModules = modules ?? ["down_proj"] };
            case "adapter":
                return new SerialAdapterConfig { Size = rank, TargetModules = modules ?? ["down_proj"] };
            case "ia3":
                Ia3Config ia3 = modules is null ? new Ia3Config() : new Ia3Config { TargetModules = modules };
                return ia3 with { FeedforwardModules = [.. ia3.FeedforwardModules.Where(ia3.TargetModules.Contains)] };
            default:
                throw new ArgumentException($"--method: '{method}' is unknown; known are lora, adapter and ia3.");
        }
    }

    private static void SaveJson(string? file, Action<Utf8JsonWriter> write)
    {
        if (file is not null)
        {
            AtomicFile.WriteJson(file, write);
        }
    }
}
