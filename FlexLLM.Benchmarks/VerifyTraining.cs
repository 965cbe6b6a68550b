using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>
/// Loss, gradients and ten optimizer steps of one adapter against the goldens; then again with random windows beside
/// inference rows, which must give the same bits as the run in one piece.
/// </summary>
internal sealed class VerifyTraining(VerifyVerb report, GoldenModel golden, LoadedModel model, string variant, string adapterFolder)
    : IDisposable
{
    private const int RowsMax = 256;
    private const int Steps = 10;
    private const double GradientBound = 1e-5;
    private const double LossBound = 1e-6;

    // Multiple of the float32-against-float64 error for logits (max) and for AdamW weights (rms).
    private const double Slack = 4;

    // Of a loss curve whose learning rate amplifies the rounding of its first steps, float32 itself is one draw, and so are we:
    // between two orders of summation whose gradients agree to 2e-7 our own distance moved from 0.3 to 4.4 times of it.
    private const double UnstableSlack = 8;

    private readonly ForwardPass _forward = new(model, RowsMax, sampledMax: RowsMax);
    private readonly BackwardPass _backward = new(model, RowsMax);
    private readonly TokenBatch _batch = new(RowsMax);

    private LoadedModel Model => model;

    private string AdapterFolder => adapterFolder;

    private string Prefix => $"lora.{variant}";

    public void Run()
    {
        CheckAdapterLogits();
        CheckGradients();
        CheckOptimizer("sgd", new SgdOptions { LearningRate = 0.05f });
        CheckOptimizer("adamw", new AdamWOptions { LearningRate = 1e-3f, WeightDecay = 0.01f });
    }

    public void Dispose()
    {
        _forward.Dispose();
        _backward.Dispose();
    }

    // Labels are the ids with the first five masked; position t predicts id t + 1.
    private TrainingSample Sample()
    {
        int[] ids = golden.Ints["ids.120"];
        bool[] carriesLoss = [.. ids.Select((_, t) => t >= 5)];
        return TrainingSample.FromTokens(ids, carriesLoss);
    }

    private TrainingRun Start(OptimizerOptions optimizer, int steps) => new(
        model, PeftFolder.Load(adapterFolder, model), new TrainingPlan { Samples = [Sample()], Epochs = steps, Optimizer = optimizer });

    private void CheckAdapterLogits()
    {
        using PeftAdapter adapter = PeftFolder.Load(adapterFolder, model);
        using var runner = new SequenceRunner(model, RowsMax, adapter);
        string name = $"{Prefix}.logits_last4.120";
        float[] logits = runner.Run(_forward, _batch, golden.Ints["ids.120"], 4);
        report.ReportError(
            golden.Name, name, Distance.Max(logits, golden.Reference(name)!), Slack * golden.F32Error(name, "max_abs_diff")!.Value);
    }

    private void CheckGradients()
    {
        using TrainingRun whole = Start(new SgdOptions(), 1);
        RunToStep(whole, windows: null);
        double worst = 0;
        foreach ((string key, float[] ours) in Gradients(whole))
        {
            double error = Distance.Relative(ours, golden.Reference($"{Prefix}.grad.{key}")!);
            worst = error <= worst ? worst : error;
        }

        report.ReportError(golden.Name, $"{Prefix}.grad (worst tensor)", worst, GradientBound);

        float[][] gradients = [.. Gradients(whole).Select(g => g.Values)];
        whole.Step();
        double loss = golden.Scalar($"{Prefix}.loss");
        report.ReportError(golden.Name, $"{Prefix}.loss", Math.Abs(whole.LastLoss - loss) / loss, LossBound);

        bool same = true;
        for (ulong seed = 1; seed <= 5; seed++)
        {
            using TrainingRun cut = Start(new SgdOptions(), 1);
            using var traffic = new Traffic(this, seed);
            RunToStep(cut, traffic);
            same &= gradients.Zip(Gradients(cut)).All(p => p.First.AsSpan().SequenceEqual(p.Second.Values));
            cut.Step();
            same &= cut.LastLoss.Equals(whole.LastLoss) && traffic.SameAsAlone();
        }

        report.Report(golden.Name, $"{Prefix}.grad in windows beside requests", same, "same bits, requests too");
    }

    // Where float32 itself strays further from float64 than the plain bound allows, the bound is a small multiple of that.
    private void CheckOptimizer(string name, OptimizerOptions options)
    {
        (double[] losses, Dictionary<string, float[]> weights) = Train(options, traffic: null);
        string curve = $"{Prefix}.{name}.losses";
        double curveOfF32 = Distance.Curve(golden.ScalarsF32(curve), golden.Scalars(curve));
        report.ReportError(
            golden.Name, curve, Distance.Curve(losses, golden.Scalars(curve)), Math.Max(GradientBound, UnstableSlack * curveOfF32));

        string final = $"{Prefix}.{name}.final";
        double difference = 0;
        double count = 0;
        foreach ((string key, float[] ours) in weights)
        {
            double[] reference = golden.Reference($"{final}.{key}")!;
            difference += ours.Zip(reference).Sum(p => (p.First - p.Second) * (p.First - p.Second));
            count += reference.Length;
        }

        double rms = Math.Sqrt(difference / count);
        double rmsOfF32 = golden.F32Error(final, "rms_diff")!.Value;
        double plain = name == "sgd" ? GradientBound * golden.F32Error(final, "rms_value")!.Value : 0;
        report.ReportError(golden.Name, $"{final} (rms)", rms, Math.Max(plain, Slack * rmsOfF32));

        using var traffic = new Traffic(this, 77);
        (double[] cutLosses, Dictionary<string, float[]> cutWeights) = Train(options, traffic);
        bool same = losses.AsSpan().SequenceEqual(cutLosses) && weights.All(w => w.Value.AsSpan().SequenceEqual(cutWeights[w.Key]));
        report.Report(golden.Name, $"{Prefix}.{name} in windows beside requests", same && traffic.SameAsAlone(), "same bits, requests too");
    }

    // Ten steps, then one more forward for the loss after the last step.
    private (double[] Losses, Dictionary<string, float[]> Weights) Train(OptimizerOptions options, Traffic? traffic)
    {
        using TrainingRun run = Start(options, Steps + 1);
        var losses = new List<double>();
        Dictionary<string, float[]> weights = [];
        for (int step = 0; step <= Steps; step++)
        {
            if (step == Steps)
            {
                weights = Download(run.Adapter);
            }

            RunToStep(run, traffic);
            run.Step();
            losses.Add(run.LastLoss);
        }

        return ([.. losses], weights);
    }

    // One sample up to the point where its optimizer step is due.
    private void RunToStep(TrainingRun run, Traffic? windows)
    {
        bool due = false;
        while (!due)
        {
            TrainingCursor cursor = run.Cursor;
            if (cursor.Phase == TrainingPhase.Forward)
            {
                int left = cursor.Sample.Ids.Length - cursor.PositionsDone;
                int tokens = windows?.WindowOf(left) ?? left;
                _batch.Clear();
                windows?.AddRequests(_batch);
                run.AddForwardWindow(_batch, tokens);
                TensorSlice logits = _forward.Run(_batch);
                windows?.TakeLogits(logits);
                run.CompleteForward(tokens);
            }
            else
            {
                due = run.RunBackward(_backward, windows?.WindowOf(cursor.RowsLeft) ?? cursor.RowsLeft);
            }
        }
    }

    private IEnumerable<(string Key, float[] Values)> Gradients(TrainingRun run)
    {
        foreach ((int site, AdapterTensor tensor) in run.Adapter.Tensors())
        {
            DeviceTensor gradient = run.Gradients[site][tensor.Spec.Name == "lora_A" ? 0 : 1];
            yield return (PeftFolder.TensorName(site, tensor.Spec.Name), InFileOrder(tensor, Host(gradient)));
        }
    }

    // PEFT stores lora_B [out, rank].
    private static float[] InFileOrder(AdapterTensor tensor, float[] values) => tensor.Spec.Name == "lora_A"
        ? values
        : PeftFolder.Transpose(values, tensor.Spec.Inner, tensor.Spec.Wide);

    private Dictionary<string, float[]> Download(PeftAdapter adapter) => adapter.Tensors().ToDictionary(
        t => PeftFolder.TensorName(t.Site, t.Tensor.Spec.Name), t => InFileOrder(t.Tensor, Host(t.Tensor.Values)));

    private float[] Host(DeviceTensor tensor)
    {
        float[] values = new float[tensor.Rows * tensor.Columns];
        model.Backend.Download(tensor, values);
        return values;
    }

    /// <summary>
    /// Requests that decode beside the job (on the bare model and on a fixed adapter), and the windows it is cut into.
    /// </summary>
    private sealed class Traffic : IDisposable
    {
        private readonly VerifyTraining _owner;
        private readonly PeftAdapter _adapter;
        private readonly SequenceRunner[] _together;
        private readonly List<int>[] _fed = [[], []];
        private readonly List<float[]>[] _seen = [[], []];
        private readonly int[] _pending = new int[2];
        private SeededRandom _random;

        public Traffic(VerifyTraining owner, ulong seed)
        {
            _owner = owner;
            _random = new SeededRandom(seed);
            _adapter = PeftFolder.Load(owner.AdapterFolder, owner.Model);
            _together = [new SequenceRunner(owner.Model, 1024), new SequenceRunner(owner.Model, 1024, _adapter)];
        }

        public int WindowOf(int left) => 1 + _random.Next(Math.Min(left, 1 + _random.Next(left)));

        public void AddRequests(TokenBatch batch)
        {
            for (int i = 0; i < _together.Length; i++)
            {
                int limit = _owner.Model.PositionsMax;
                int count = Math.Min(1 + _random.Next(5), limit - _together[i].Length);
                int[] ids = [.. Enumerable.Range(0, count).Select(_ => _random.Next(_owner.Model.Config.VocabularySize))];
                if (count == 0)
                {
                    continue;
                }

                _fed[i].AddRange(ids);
                _together[i].AddTo(batch, ids, count);
                _pending[i] = count;
            }
        }

        public void TakeLogits(TensorSlice logits)
        {
            int vocabulary = _owner.Model.Config.VocabularySize;
            int row = 0;
            for (int i = 0; i < _pending.Length; i++)
            {
                float[] values = new float[_pending[i] * vocabulary];
                _owner.Model.Backend.Download(logits.Slice(row, _pending[i]), values);
                _seen[i].Add(values);
                row += _pending[i];
                _pending[i] = 0;
            }
        }

        /// <summary>Every request's logits have the bits that it gets without company.</summary>
        public bool SameAsAlone()
        {
            bool same = true;
            for (int i = 0; i < _together.Length; i++)
            {
                using var alone = new SequenceRunner(_owner.Model, 1024, i == 1 ? _adapter : null);
                int start = 0;
                foreach (float[] seen in _seen[i].Where(s => s.Length > 0))
                {
                    int count = seen.Length / _owner.Model.Config.VocabularySize;
                    int[] ids = [.. _fed[i].Skip(start).Take(count)];
                    same &= seen.AsSpan().SequenceEqual(alone.Run(_owner._forward, _owner._batch, ids, count));
                    start += count;
                }
            }

            return same;
        }

        public void Dispose()
        {
            foreach (SequenceRunner runner in _together)
            {
                runner.Dispose();
            }

            _adapter.Dispose();
        }
    }
}
