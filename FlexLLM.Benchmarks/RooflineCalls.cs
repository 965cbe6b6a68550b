using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Benchmarks.Serving;
using FlexLLM.Execution;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>
/// What the calls of a decode step cost the host: a model with the layers of an 8B one, whose matrices are so small that computing
/// takes next to nothing beside, through the forward pass that the engine uses. A GPU works through calls while the host makes the
/// next ones: where making all of them takes less than reading the weights of the real model, they cost nothing.
/// </summary>
/// <param name="Rows">Sequences that decode at once.</param>
/// <param name="Adapters">LoRA adapters of them, each sequence's the next one's; 0 is none.</param>
/// <param name="Dispatch">Seconds until every call of a step was made; on a GPU nothing is waited for.</param>
/// <param name="Step">Seconds until the logits are on the host.</param>
/// <param name="TensorsMade">Native tensors that a step makes: views and results, each a call and an object.</param>
/// <param name="ManagedBytes">Bytes that a step takes from the garbage collector.</param>
internal sealed record RooflineCalls(int Rows, int Adapters, Spread Dispatch, Spread Step, double TensorsMade, double ManagedBytes)
{
    /// <summary>The shape whose layers are called.</summary>
    public const string Shape = "llama-3.1-8b";

    /// <summary>What is measured.</summary>
    public static readonly (int Rows, int Adapters)[] Measured = [(1, 0), (16, 0), (16, 1), (16, 16)];

    /// <summary>Memory bandwidth by the data sheets, in bytes a second: not measured here.</summary>
    public static readonly (string Name, double BytesPerSecond)[] DataSheets = [("H100 SXM", 3.35e12), ("A100 80GB", 2.04e12)];

    private const int Context = 64;
    private const int WarmUpSteps = 20;
    private const int StepsPerRepetition = 60;
    private const int PositionsMax = Context + WarmUpSteps + StepsPerRepetition;

    private static readonly LoraConfig Method = new() { Rank = 16, Alpha = 16, TargetModules = PeftConfig.AllModules };

    /// <summary>Bytes that a decode step of the real model reads, in BF16: every matrix but the table of embeddings.</summary>
    public static double WeightBytes { get; } = DecoderWeights.Of(ModelShapes.Of(Shape))
        .Where(w => !w.IsVector && !w.Name.Contains("embed", StringComparison.Ordinal)).Sum(w => w.Count) * 2.0;

    /// <summary>Share of the time that the real model's weights take at a bandwidth.</summary>
    public double ShareAt(double bytesPerSecond) => Dispatch.Median / (WeightBytes / bytesPerSecond);

    /// <param name="backend">The device; it stays the caller's.</param>
    /// <param name="rows">Sequences.</param>
    /// <param name="adapterCount">LoRA adapters of all linears, of rank 16.</param>
    /// <param name="repeat">How often to take the steps of a repetition.</param>
    /// <param name="tensorsMade">How many native tensors this thread has made so far.</param>
    public static RooflineCalls Measure(
        IComputeBackend backend, int rows, int adapterCount, int repeat, Func<long> tensorsMade)
    {
        ModelConfig config = Narrow();
        using var weights = new RandomWeights(config, DType.BF16, seed: 1);
        int blocksPerRow = BlockTable.BlocksFor(PositionsMax);
        using var model = LoadedModel.CreateRandom(weights, backend, PositionsMax);
        using DeviceKvCache cache = backend.CreateKvCache(config.LayerCount, rows * blocksPerRow, config.KeyValueHeads, config.HeadDim);
        using var pass = new ForwardPass(model, Math.Max(rows, Context), rows);
        var batch = new TokenBatch(Math.Max(rows, Context));
        int[][] blocks = [.. Enumerable.Range(0, rows).Select(row => Enumerable.Range(row * blocksPerRow, blocksPerRow).ToArray())];
        using var adapters = new ResourceSet();
        PeftAdapter[] own = [.. Enumerable.Range(0, adapterCount)
            .Select(i => adapters.Add(PeftAdapter.CreateRandom(backend, config, Method, (ulong)i)))];
        float[] logits = new float[rows * config.VocabularySize];
        var dispatch = new List<double>();
        var step = new List<double>();
        (long made, long bytes) = (0, 0);
        for (int repetition = 0; repetition < repeat; repetition++)
        {
            foreach (int[] table in blocks)
            {
                batch.Clear();
                batch.AddInference(new int[Context], 0, cache, table, adapter: null, sampled: 1);
                backend.Download(pass.Run(batch), logits.AsSpan(0, config.VocabularySize));
            }

            for (int position = Context; position < PositionsMax; position++)
            {
                if (position == Context + WarmUpSteps)
                {
                    (made, bytes) = (made - tensorsMade(), bytes - GC.GetAllocatedBytesForCurrentThread());
                }

                long start = Stopwatch.GetTimestamp();
                batch.Clear();
                for (int row = 0; row < rows; row++)
                {
                    PeftAdapter? adapter = own.Length == 0 ? null : own[row % own.Length];
                    batch.AddInference([1], position, cache, blocks[row], adapter, sampled: 1);
                }

                TensorSlice device = pass.Run(batch);
                double called = Stopwatch.GetElapsedTime(start).TotalSeconds;
                backend.Download(device, logits);
                double ended = Stopwatch.GetElapsedTime(start).TotalSeconds;
                if (position >= Context + WarmUpSteps)
                {
                    dispatch.Add(called);
                    step.Add(ended);
                }
            }

            (made, bytes) = (made + tensorsMade(), bytes + GC.GetAllocatedBytesForCurrentThread());
        }

        return new RooflineCalls(
            rows, adapterCount, Spread.Of(dispatch), Spread.Of(step), (double)made / dispatch.Count, (double)bytes / dispatch.Count);
    }

    /// <summary>Writes what the steps cost, and what share of the real model's step that is.</summary>
    /// <param name="output">Where to.</param>
    /// <param name="all">What was measured.</param>
    /// <param name="copyBytesPerSecond">What the device copied at best; null where it is not one that an 8B model is served on.</param>
    public static void Print(TextWriter output, IReadOnlyList<RooflineCalls> all, double? copyBytesPerSecond)
    {
        ModelConfig config = Narrow();
        output.WriteLine($"calls of a decode step: {Shape}'s {config.LayerCount} layers, {config.HiddenSize} wide, BF16 weights");
        output.WriteLine($"{"",-22}{"called, ms",12}{"ended, ms",12}{"tensors",12}{"KiB",12}");
        foreach (RooflineCalls calls in all)
        {
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{NameOf(calls),-22}{1e3 * calls.Dispatch.Median,12:0.00}{1e3 * calls.Step.Median,12:0.00}" +
                $"{calls.TensorsMade,12:0}{calls.ManagedBytes / 1024,12:0.0}"));
        }

        output.WriteLine($"called, as a share of reading {(WeightBytes / 1e9).Fixed(1)} GB of {Shape}'s weights at");
        foreach ((string name, double bandwidth) in Bandwidths(copyBytesPerSecond))
        {
            string shares = string.Join(", ", all.Select(calls => $"{(100 * calls.ShareAt(bandwidth)).Fixed(1)} % ({NameOf(calls)})"));
            output.WriteLine($"  {name}, {(1e3 * WeightBytes / bandwidth).Fixed(2)} ms: {shares}");
        }
    }

    /// <summary>Writes "calls": [ ... ].</summary>
    public static void Write(Utf8JsonWriter json, IReadOnlyList<RooflineCalls> all, double? copyBytesPerSecond)
    {
        json.WriteStartArray("calls");
        foreach (RooflineCalls calls in all)
        {
            json.WriteStartObject();
            json.WriteString("shape", Shape);
            json.WriteNumber("rows", calls.Rows);
            json.WriteNumber("adapters", calls.Adapters);
            calls.Dispatch.Write(json, "called_seconds");
            calls.Step.Write(json, "step_seconds");
            json.WriteNumber("tensors_made", calls.TensorsMade);
            json.WriteNumber("managed_bytes", calls.ManagedBytes);
            json.WriteStartArray("shares");
            foreach ((string name, double bandwidth) in Bandwidths(copyBytesPerSecond))
            {
                json.WriteStartObject();
                json.WriteString("of", name);
                json.WriteNumber("bound_seconds", WeightBytes / bandwidth);
                json.WriteNumber("share", calls.ShareAt(bandwidth));
                json.WriteEndObject();
            }

            json.WriteEndArray();
            json.WriteEndObject();
        }

        json.WriteEndArray();
    }

    private static IEnumerable<(string Name, double BytesPerSecond)> Bandwidths(double? copyBytesPerSecond)
    {
        (string, double)[] measured = copyBytesPerSecond is double copy ? [("this device's copy bandwidth", copy)] : [];
        return measured.Concat(DataSheets.Select(sheet => ($"{sheet.Name}'s bandwidth by its data sheet", sheet.BytesPerSecond)));
    }

    private static string NameOf(RooflineCalls calls) => (calls.Rows == 1 ? "1 row" : $"{calls.Rows} rows") + calls.Adapters switch
    {
        0 => "",
        1 => ", 1 adapter",
        _ => $", {calls.Adapters} adapters",
    };

    // As many layers, and heads in groups of as many; all else as small as may be.
    private static ModelConfig Narrow() => ModelShapes.Of(Shape) with
    {
        HiddenSize = 64,
        IntermediateSize = 128,
        AttentionHeads = 8,
        KeyValueHeads = 2,
        HeadDim = 16,
        VocabularySize = 256,
        EosTokenIds = [],
    };
}
