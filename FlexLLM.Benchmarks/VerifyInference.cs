using System.Globalization;
using FlexLLM.Execution;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>Logits and greedy continuations against the goldens, whole, in random chunks, and in company.</summary>
internal sealed class VerifyInference(VerifyVerb report, GoldenModel golden, LoadedModel model) : IDisposable
{
    // Multiple of the float32-against-float64 error of the group that a logit may be off the float64 value.
    private const double Slack = 4;

    // The golden run's own error in a sum over all logits is what its rounding errors happened to leave after cancelling, on
    // some models less than a hundredth of an ulp. Half an ulp of the sum is as much as one rounding of the final norm makes.
    private const double HalfUlp = 1.0 / (1 << 24);

    private readonly ForwardPass _pass = new(model, rowsMax: 256, sampledMax: 256);
    private readonly TokenBatch _batch = new(256);

    public void Run()
    {
        int[] lengths =
        [
            .. golden.Ints.Keys.Where(k => k.StartsWith("ids.", StringComparison.Ordinal))
                .Select(k => int.Parse(k.AsSpan(4), CultureInfo.InvariantCulture)).Order(),
        ];
        foreach (int length in lengths)
        {
            int[] ids = golden.Ints[$"ids.{length}"];
            float[] logits = Prefill(ids, [ids.Length]);
            CompareLogits(length, logits);
            CheckChunks(length, ids, logits);
            CheckGreedy(length, ids);
        }

        CheckCompany(lengths);
    }

    public void Dispose() => _pass.Dispose();

    private void CompareLogits(int length, float[] logits)
    {
        int vocabulary = model.Config.VocabularySize;
        if (golden.Reference($"logits.{length}") is double[] all)
        {
            report.ReportError(golden.Name, $"logits.{length}", Distance.Max(logits, all), Bound($"logits.{length}"));
        }

        if (golden.Reference($"logits_last4.{length}") is double[] last)
        {
            bool hasOwnError = golden.F32Error($"logits_last4.{length}", "max_abs_diff") is not null;
            string group = hasOwnError ? $"logits_last4.{length}" : $"logits.{length}";
            report.ReportError(
                golden.Name, $"logits_last4.{length}", Distance.Max(logits.AsSpan(logits.Length - (4 * vocabulary)), last), Bound(group));
        }

        if (golden.Reference($"logits_sum.{length}") is double[] sum)
        {
            double ours = logits.Sum(v => (double)v);
            double squares = logits.Sum(v => (double)v * v);
            report.ReportError(golden.Name, $"logits_sum.{length}", Math.Abs(ours - sum[0]), Bound($"logits_sum.{length}"));
            report.ReportError(
                golden.Name, $"logits_sqsum.{length}", Math.Abs(squares - golden.Reference($"logits_sqsum.{length}")![0]),
                Math.Max(Bound($"logits_sqsum.{length}"), squares * HalfUlp));
        }
    }

    private double Bound(string group) => Slack * golden.F32Error(group, "max_abs_diff")!.Value;

    private void CheckChunks(int length, int[] ids, float[] whole)
    {
        var random = new SeededRandom((ulong)length);
        bool same = Enumerable.Range(0, 5).All(_ => whole.AsSpan().SequenceEqual(Prefill(ids, Cuts.Random(ids.Length, ref random))));
        same &= whole.AsSpan().SequenceEqual(Prefill(ids, [.. Enumerable.Repeat(1, ids.Length)]));
        report.Report(golden.Name, $"chunked prefill.{length}", same, "same bits");
    }

    private void CheckGreedy(int length, int[] ids)
    {
        int[] expected = golden.Ints[$"greedy.{length}"];
        int[] ours = Greedy(ids, expected.Length);
        int equal = ours.Zip(expected).TakeWhile(p => p.First == p.Second).Count();
        report.Report(golden.Name, $"greedy.{length}", equal == expected.Length, $"{equal} of {expected.Length} tokens");
    }

    // All prompts decode together; each must give the bits that it gives alone.
    private void CheckCompany(int[] lengths)
    {
        const int Steps = 8;
        int vocabulary = model.Config.VocabularySize;
        SequenceRunner[] together = [.. lengths.Select(_ => new SequenceRunner(model, 256))];
        SequenceRunner[] alone = [.. lengths.Select(_ => new SequenceRunner(model, 256))];
        int[][] next = [.. lengths.Select(l => golden.Ints[$"ids.{l}"])];
        bool same = true;
        for (int step = 0; step < Steps; step++)
        {
            _batch.Clear();
            for (int i = 0; i < lengths.Length; i++)
            {
                together[i].AddTo(_batch, next[i], 1);
            }

            float[] logits = new float[lengths.Length * vocabulary];
            model.Backend.Download(_pass.Run(_batch), logits);
            for (int i = 0; i < lengths.Length; i++)
            {
                Span<float> row = logits.AsSpan(i * vocabulary, vocabulary);
                same &= row.SequenceEqual(alone[i].Run(_pass, _batch, next[i], 1));
                next[i] = [ArgMax(row)];
            }
        }

        foreach (SequenceRunner runner in together.Concat(alone))
        {
            runner.Dispose();
        }

        report.Report(golden.Name, "batched against alone", same, "same bits");
    }

    private float[] Prefill(int[] ids, int[] cuts)
    {
        using var runner = new SequenceRunner(model, 256);
        var logits = new List<float>();
        int start = 0;
        foreach (int cut in cuts)
        {
            logits.AddRange(runner.Run(_pass, _batch, ids.AsSpan(start, cut), cut));
            start += cut;
        }

        return [.. logits];
    }

    private int[] Greedy(int[] ids, int count)
    {
        using var runner = new SequenceRunner(model, 256);
        int[] result = new int[count];
        ReadOnlySpan<int> next = ids;
        for (int i = 0; i < count; i++)
        {
            result[i] = ArgMax(runner.Run(_pass, _batch, next, 1));
            next = result.AsSpan(i, 1);
        }

        return result;
    }

    private static int ArgMax(ReadOnlySpan<float> row)
    {
        int best = 0;
        for (int i = 1; i < row.Length; i++)
        {
            best = row[i] > row[best] ? i : best;
        }

        return best;
    }
}

/// <summary>Random ways to cut a length into windows.</summary>
internal static class Cuts
{
    public static int[] Random(int length, ref SeededRandom random)
    {
        var cuts = new List<int>();
        while (length > 0)
        {
            int cut = 1 + random.Next(Math.Min(length, 1 + random.Next(length)));
            cuts.Add(cut);
            length -= cut;
        }

        return [.. cuts];
    }
}
