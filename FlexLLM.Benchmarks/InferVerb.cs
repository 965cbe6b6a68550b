using System.Diagnostics;
using System.Globalization;
using System.Numerics.Tensors;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Formats;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `infer`: prefill and greedy decode of random tokens straight through the forward pass, without an engine. Download of the
/// logits and choice of the token are part of the time.
/// </summary>
internal sealed class InferVerb : IDisposable
{
    public const string Usage =
        BenchModel.Usage + " [--prompt 512] [--chunk 512] [--decode 128] [--batch 1,8,16] [--context 256] [--batch-decode 32] " +
        "[--repeat 3] [--json FILE]";

    private readonly BenchModel _bench;
    private readonly Settings _settings;
    private readonly ForwardPass _pass;
    private readonly TokenBatch _batch;
    private readonly SequenceRunner[] _runners;
    private readonly float[] _logits;
    private readonly List<Row> _rows = [];
    private Roofline? _roofline;

    private InferVerb(BenchModel bench, Settings settings)
    {
        _bench = bench;
        _settings = settings;
        int sequences = settings.Batches.Max();
        int rowsMax = Math.Max(Math.Min(settings.Chunk, settings.Positions), sequences);
        _pass = new ForwardPass(bench.Model, rowsMax, sampledMax: sequences);
        _batch = new TokenBatch(rowsMax);
        _runners = [.. Enumerable.Range(0, sequences).Select(_ => new SequenceRunner(bench.Model, settings.Positions))];
        _logits = new float[sequences * bench.Model.Config.VocabularySize];
    }

    public static int Run(string[] args)
    {
        CommandLine.Allow(
            args,
            [
                .. BenchModel.Options, "--prompt", "--chunk", "--decode", "--batch", "--context", "--batch-decode", "--repeat", "--json",
            ]);
        Settings settings = Settings.Parse(args);
        string? file = CommandLine.Text(args, "--json");
        using BenchModel bench = BenchModel.Open(args, settings.Positions);
        using var verb = new InferVerb(bench, settings);
        verb.Measure();
        verb.Print(Console.Out);
        if (file is not null)
        {
            verb.Save(file);
        }

        return 0;
    }

    public void Dispose()
    {
        foreach (SequenceRunner runner in _runners)
        {
            runner.Dispose();
        }

        _pass.Dispose();
    }

    private void Measure()
    {
        ModelWork work = _bench.Work;
        int[] prompt = _bench.RandomIds(_settings.Prompt, seed: 1);
        Add(
            $"prefill {_settings.Prompt}", _settings.Prompt, () => Prefill(_runners[0], prompt), Bound.Matrix,
            work.PrefillFlops(_settings.Prompt));
        AddDecode($"decode {_settings.Decode}", 1, 0, _settings.Decode);
        for (int i = 0; i < _runners.Length; i++)
        {
            Console.Error.WriteLine($"context of sequence {i + 1} of {_runners.Length}");
            Prefill(_runners[i], _bench.RandomIds(_settings.Context, seed: 2 + (ulong)i));
        }

        foreach (int batch in _settings.Batches)
        {
            AddDecode($"decode, batch {batch}, after {_settings.Context}", batch, _settings.Context, _settings.BatchDecode);
        }

        // Last, so that nothing else finds the memory and the clock of a processor otherwise than it would be without.
        _roofline = _bench.MeasureRoofline();
    }

    private void AddDecode(string name, int batch, int context, int steps) => Add(
        name, batch * steps, () => Decode(batch, context, steps), Bound.Copy,
        steps * _bench.Work.DecodeBytes(batch, context + ((steps + 1) / 2.0)));

    // One unmeasured repetition lets the runtime compile the hot loops and the backend size its scratch memory.
    private void Add(string work, int tokens, Action run, Bound bound, double amount)
    {
        run();
        double[] seconds = new double[_settings.Repeat];
        for (int i = 0; i < seconds.Length; i++)
        {
            long start = Stopwatch.GetTimestamp();
            run();
            seconds[i] = Stopwatch.GetElapsedTime(start).TotalSeconds;
            Console.Error.WriteLine(string.Create(
                CultureInfo.InvariantCulture, $"{work}: {i + 1} of {seconds.Length}, {tokens / seconds[i]:0.0} tokens/s"));
        }

        _rows.Add(new Row(work, Spread.Of(seconds.Select(s => tokens / s)), bound, amount, Spread.Of(seconds).Median));
    }

    private double Share(Row row) => row.Bound == Bound.Matrix
        ? _roofline!.ShareOfMatrix(row.Amount, row.Seconds, _bench.WeightType)
        : _roofline!.ShareOfCopy(row.Amount, row.Seconds);

    /// <summary>Fills the sequence from its start in chunks; only the last row's logits are computed.</summary>
    private void Prefill(SequenceRunner runner, int[] ids)
    {
        Span<int> next = stackalloc int[1];
        runner.Rewind(0);
        for (int start = 0; start < ids.Length; start += _settings.Chunk)
        {
            int count = Math.Min(_settings.Chunk, ids.Length - start);
            _batch.Clear();
            runner.AddTo(_batch, ids.AsSpan(start, count), sampled: start + count == ids.Length ? 1 : 0);
            Choose(_pass.Run(_batch), next);
        }
    }

    private void Decode(int sequences, int context, int steps)
    {
        Span<int> next = new int[sequences];
        foreach (SequenceRunner runner in _runners.AsSpan(0, sequences))
        {
            runner.Rewind(context);
        }

        for (int step = 0; step < steps; step++)
        {
            _batch.Clear();
            for (int i = 0; i < sequences; i++)
            {
                _runners[i].AddTo(_batch, next.Slice(i, 1), sampled: 1);
            }

            Choose(_pass.Run(_batch), next);
        }
    }

    /// <summary>The likeliest token of each row of logits.</summary>
    private void Choose(TensorSlice logits, Span<int> next)
    {
        Span<float> host = _logits.AsSpan(0, logits.Rows * logits.Columns);
        _bench.Backend.Download(logits, host);
        for (int i = 0; i < logits.Rows; i++)
        {
            next[i] = TensorPrimitives.IndexOfMax<float>(host.Slice(i * logits.Columns, logits.Columns));
        }
    }

    private void Print(TextWriter output)
    {
        output.WriteLine($"{_bench.Describe()}; median, least and greatest of {_settings.Repeat}");
        output.WriteLine($"device at best: {_roofline!.Describe()}");
        output.WriteLine($"{"work",-30}{"tokens/s",10}{"min",10}{"max",10}{"",18}{"% of best",11}");
        foreach (Row row in _rows)
        {
            (double median, double min, double max) = row.TokensPerSecond;
            output.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{row.Work,-30}{median,10:0.0}{min,10:0.0}{max,10:0.0}{row.Rate,10:0.0} {row.RateUnit,-7}{100 * Share(row),11:0.0}"));
        }
    }

    private void Save(string file) => AtomicFile.WriteJson(file, json =>
    {
        json.WriteStartObject();
        _bench.Write(json);
        _roofline!.Write(json);
        json.WriteNumber("repetitions", _settings.Repeat);
        json.WriteStartArray("results");
        foreach (Row row in _rows)
        {
            json.WriteStartObject();
            json.WriteString("work", row.Work);
            row.TokensPerSecond.Write(json, "tokens_per_second");
            json.WriteNumber("seconds", row.Seconds);
            json.WriteNumber("rate", row.Rate);
            json.WriteString("rate_unit", row.RateUnit);
            json.WriteString("bound", row.Bound == Bound.Matrix ? "matrix" : "copy");
            json.WriteNumber("share_of_bound", Share(row));
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteEndObject();
    });

    /// <summary>What a device would be busy with at best.</summary>
    private enum Bound
    {
        Matrix,
        Copy,
    }

    /// <summary>A line of the table; the amount is in operations, or in bytes of weights, keys and values read.</summary>
    private readonly record struct Row(string Work, Spread TokensPerSecond, Bound Bound, double Amount, double Seconds)
    {
        public string RateUnit => Bound == Bound.Matrix ? "GFLOP/s" : "GB/s";

        public double Rate => Amount / Seconds / 1e9;
    }

    private sealed record Settings(int Prompt, int Chunk, int Decode, int[] Batches, int Context, int BatchDecode, int Repeat)
    {
        /// <summary>Longest sequence of any measurement.</summary>
        public int Positions => Math.Max(Math.Max(Prompt, Decode), Context + BatchDecode);

        public static Settings Parse(string[] args) => new(
            CommandLine.Int(args, "--prompt", 512, min: 1), CommandLine.Int(args, "--chunk", 512, min: 1),
            CommandLine.Int(args, "--decode", 128, min: 1), CommandLine.Ints(args, "--batch", [1, 8, 16], min: 1),
            CommandLine.Int(args, "--context", 256, min: 1), CommandLine.Int(args, "--batch-decode", 32, min: 1),
            CommandLine.Int(args, "--repeat", 3, min: 1));
    }
}
