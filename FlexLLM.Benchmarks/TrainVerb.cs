using System.Diagnostics;
using System.Globalization;
using FlexLLM.Adapters;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Formats;
using FlexLLM.Graph;
using FlexLLM.Models;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `train`: LoRA steps (AdamW) on one sample of random tokens that are all targets, straight through the passes, without an
/// engine: speed of the whole step, of forward (with the loss) and of backward, and memory by category as predicted from the
/// compiled programs and as it is.
/// </summary>
internal sealed class TrainVerb : IDisposable
{
    public const string Usage =
        BenchModel.Usage + " [--tokens 512] [--rank 16] [--modules down_proj|all|NAME,NAME] [--steps 3] [--window N] " +
        "[--saved-mib N] [--json FILE]";

    private readonly BenchModel _bench;
    private readonly int _tokens;
    private readonly int _window;
    private readonly TokenBatch _batch;
    private readonly ForwardPass _forward;
    private readonly BackwardPass _backward;
    private readonly TrainingRun _run;
    private readonly MemoryPlan _plan;
    private readonly long _allocatedBefore;
    private readonly long _residentBefore;
    private readonly List<StepTime> _times = [];
    private long _residentPeak;
    private Roofline? _roofline;

    private TrainVerb(BenchModel bench, LoraConfig lora, int tokens, int window, int steps, CompilerOptions options)
    {
        _bench = bench;
        _tokens = tokens;
        _window = window;
        _allocatedBefore = bench.Backend.AllocatedBytes;
        _residentBefore = Environment.WorkingSet;
        _plan = new MemoryPlan(bench.Model.Whole, bench.Model.Program, bench.Backend, shard: bench.Model.Shard, limits: new ExecutionLimits
        {
            Rows = window,
            Sequences = 0,
            Windows = 1,
            Positions = tokens,
            RankMax = lora.Rank,
            InnerMax = lora.Rank,
        });
        bench.Backend.ReserveScratch(_plan.Scratch(trains: true));
        _batch = new TokenBatch(window);
        _forward = new ForwardPass(bench.Model, window, sampledMax: 0);
        _backward = new BackwardPass(bench.Model, window);
        PeftAdapter adapter = PeftAdapter.CreateRandom(bench.Backend, bench.Model.Whole, lora, seed: 1, bench.Model.Shard);
        int[] ids = bench.RandomIds(tokens, seed: 1);
        bool[] carriesLoss = new bool[tokens];
        Array.Fill(carriesLoss, true);
        _run = new TrainingRun(bench.Model, adapter, new TrainingPlan
        {
            Samples = [TrainingSample.FromTokens(ids, carriesLoss)],
            Epochs = steps,
            Optimizer = new AdamWOptions(),
        }, bench.Model.CompileTraining(adapter.Networks, options));
    }

    public static int Run(string[] args)
    {
        CommandLine.Allow(
            args, [.. BenchModel.Options, "--tokens", "--rank", "--modules", "--steps", "--window", "--saved-mib", "--json"]);
        int tokens = CommandLine.Int(args, "--tokens", 512, min: 2);
        int steps = CommandLine.Int(args, "--steps", 3, min: 1);
        int window = Math.Min(tokens, CommandLine.Int(args, "--window", tokens, min: 1));
        string modules = CommandLine.Text(args, "--modules") ?? "down_proj";
        var lora = new LoraConfig
        {
            Rank = CommandLine.Int(args, "--rank", 16, min: 1),
            TargetModules = modules == "all" ? AdapterSites.ModuleNames : modules.Split(','),
        };
        string? file = CommandLine.Text(args, "--json");
        using BenchModel bench = BenchModel.Open(args, tokens);
        long? savedMax = CommandLine.Text(args, "--saved-mib") is null ? null : CommandLine.Int(args, "--saved-mib", 0, min: 1) * 1048576L;
        var options = new CompilerOptions
        {
            Rematerialization = new RematerializationOptions
            {
                SavedColumnsMax = savedMax / sizeof(float) / tokens,
                SequenceTokens = tokens,
            },
        };
        using var verb = new TrainVerb(bench, lora, tokens, window, steps + 1, options);
        verb.Measure(steps);
        verb.Print(Console.Out);
        if (file is not null)
        {
            verb.Save(file);
        }

        return 0;
    }

    public void Dispose()
    {
        _run.Dispose();
        _forward.Dispose();
        _backward.Dispose();
    }

    private IEnumerable<(string Part, Spread TokensPerSecond)> Speeds =>
    [
        ("step", Spread.Of(_times.Select(t => _tokens / t.Together))),
        ("forward and loss", Spread.Of(_times.Select(t => _tokens / t.Forward))),
        ("backward", Spread.Of(_times.Select(t => _tokens / t.Backward))),
        ("optimizer", Spread.Of(_times.Select(t => _tokens / t.Optimizer))),
    ];

    // One step more than asked for: the first lets the runtime compile.
    private void Measure(int steps)
    {
        for (int step = 0; step <= steps; step++)
        {
            StepTime time = Step();
            Console.Error.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"step {step} of {steps}: loss {_run.LastLoss:0.000}, {_tokens / time.Together:0.0} tokens/s"));
            if (step > 0)
            {
                _times.Add(time);
            }
        }

        // Last, so that the memory of a step is the step's.
        _roofline = _bench.MeasureRoofline();
    }

    /// <summary>Operations of a step, and the share of the device's matrix rate at the median time.</summary>
    private (double Flops, double Share) OfMatrix()
    {
        double flops = _bench.Work.TrainFlops(_tokens, _bench.Model, _run.Program);
        double seconds = Spread.Of(_times.Select(t => t.Together)).Median;
        return (flops, _roofline!.ShareOfMatrix(flops, seconds, _bench.WeightType));
    }

    private StepTime Step()
    {
        long start = Stopwatch.GetTimestamp();
        while (_run.Cursor.Phase == TrainingPhase.Forward)
        {
            int tokens = Math.Min(_window, _tokens - _run.Cursor.PositionsDone);
            _batch.Clear();
            _run.AddForwardWindow(_batch, tokens);
            _forward.Run(_batch);
            _run.CompleteForward(tokens);
            SampleResident();
        }

        _bench.Model.Backend.Synchronize();
        long forwardEnd = Stopwatch.GetTimestamp();
        while (!_run.RunBackward(_backward, Math.Min(_window, _run.Cursor.RowsLeft)))
        {
            SampleResident();
        }

        _bench.Model.Backend.Synchronize();
        long backwardEnd = Stopwatch.GetTimestamp();
        _run.Step();
        _bench.Model.Backend.Synchronize();
        return new StepTime(
            Stopwatch.GetElapsedTime(start, forwardEnd).TotalSeconds,
            Stopwatch.GetElapsedTime(forwardEnd, backwardEnd).TotalSeconds,
            Stopwatch.GetElapsedTime(backwardEnd).TotalSeconds);
    }

    private void SampleResident() => _residentPeak = Math.Max(_residentPeak, Environment.WorkingSet);

    /// <summary>What the plan says before anything is allocated.</summary>
    private MemoryTable Predicted() => _plan.OfForwardPass() +
        _plan.OfJob(_run.Program, _run.Adapter.Config, moments: 2, _tokens) +
        new MemoryTable([new(MemoryUse.Scratch, "finetuning", 1, _plan.ScratchBytes(trains: true))]);

    /// <summary>What is held. Scratch is what the backend counts beside all tensors.</summary>
    private MemoryTable Real()
    {
        MemoryTable tensors = _forward.Memory() + _run.Memory() + _backward.Memory(_run.Program);
        long scratch = _bench.Backend.AllocatedBytes - _allocatedBefore - tensors.Bytes;
        return tensors + new MemoryTable([new(MemoryUse.Scratch, "finetuning", 1, scratch)]);
    }

    private List<MemoryLine> Memory()
    {
        MemoryTable predicted = Predicted();
        MemoryTable real = Real();
        List<MemoryLine> rows = [.. predicted.Uses.Select(use => new MemoryLine(use, predicted.Of(use), real.Of(use)))];
        rows.Add(new MemoryLine("together", predicted.Bytes, real.Bytes));
        return rows;
    }

    /// <summary>Saved values by their place in a layer, with the bytes of one token and the layers that save them.</summary>
    private IEnumerable<(string Value, long BytesPerToken, int Layers)> Saved => _run.Program.Saved
        .GroupBy(s => s.Role)
        .Select(g => (g.Key, _plan.SavedBytes(g.First(), tokens: 1), g.Count()));

    private double SavedPerTokenAndLayer =>
        (double)_run.Program.Saved.Sum(s => _plan.SavedBytes(s, tokens: 1)) / _bench.Model.Config.LayerCount;

    private string Describe() =>
        $"{_bench.Describe()}; {_run.Adapter.Config.Describe()}; " +
        $"{_tokens} tokens in windows of {_window}; median, least and greatest of {_times.Count} steps";

    private void Print(TextWriter output)
    {
        CultureInfo culture = CultureInfo.InvariantCulture;
        output.WriteLine(Describe());
        output.WriteLine($"{"part",-32}{"tokens/s",14}{"min",10}{"max",10}");
        foreach ((string part, Spread speed) in Speeds)
        {
            output.WriteLine(string.Create(culture, $"{part,-32}{speed.Median,14:0.0}{speed.Min,10:0.0}{speed.Max,10:0.0}"));
        }

        (double flops, double share) = OfMatrix();
        output.WriteLine(string.Create(
            culture, $"{"GFLOP a step, % of best",-32}{flops / 1e9,14:0.0}{100 * share,10:0.0}   ({_roofline!.Describe()})"));
        output.WriteLine($"{"memory, MiB",-32}{"predicted",14}{"real",10}");
        foreach (MemoryLine row in Memory())
        {
            output.WriteLine(string.Create(
                culture, $"{row.Category,-32}{row.Predicted / 1048576.0,14:0.00}{row.Real / 1048576.0,10:0.00}"));
        }

        output.WriteLine(string.Create(
            culture, $"{"resident above the idle model",-32}{(_residentPeak - _residentBefore) / 1048576.0,24:0.00}"));
        output.WriteLine(string.Create(
            culture, $"saved for the backward pass: {SavedPerTokenAndLayer:N0} bytes a token and layer"));
        foreach ((string value, long bytes, int layers) in Saved)
        {
            output.WriteLine(string.Create(culture, $"  {value,-20}{bytes,8:N0} bytes a token in {layers} layers"));
        }
    }

    private void Save(string file) => AtomicFile.WriteJson(file, json =>
    {
        json.WriteStartObject();
        _bench.Write(json);
        _roofline!.Write(json);
        json.WriteString("adapter", _run.Adapter.Config.Describe());
        json.WriteNumber("tokens", _tokens);
        json.WriteNumber("window", _window);
        json.WriteNumber("steps", _times.Count);
        json.WriteStartObject("tokens_per_second");
        foreach ((string part, Spread speed) in Speeds)
        {
            speed.Write(json, part);
        }

        json.WriteEndObject();
        (double flops, double share) = OfMatrix();
        json.WriteNumber("flops_per_step", flops);
        json.WriteNumber("step_seconds", Spread.Of(_times.Select(t => t.Together)).Median);
        json.WriteString("bound", "matrix");
        json.WriteNumber("share_of_bound", share);
        json.WriteStartArray("memory");
        foreach (MemoryLine row in Memory())
        {
            json.WriteStartObject();
            json.WriteString("category", row.Category);
            json.WriteNumber("predicted_bytes", row.Predicted);
            json.WriteNumber("real_bytes", row.Real);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteNumber("resident_above_idle_bytes", _residentPeak - _residentBefore);
        json.WriteNumber("saved_bytes_per_token_and_layer", SavedPerTokenAndLayer);
        json.WriteEndObject();
    });

    /// <summary>Seconds of one step.</summary>
    private readonly record struct StepTime(double Forward, double Backward, double Optimizer)
    {
        public double Together => Forward + Backward + Optimizer;
    }

    private readonly record struct MemoryLine(string Category, long Predicted, long Real);
}
