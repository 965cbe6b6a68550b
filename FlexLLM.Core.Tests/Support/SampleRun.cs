using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Support;

/// <summary>One sample through forward, loss and backward of a method whose tensors are all random, without an engine.</summary>
internal sealed class SampleRun : IDisposable
{
    private const int RowsMax = 64;

    private readonly LoadedModel _model;
    private readonly TrainingRun _run;
    private readonly ForwardPass _forward;
    private readonly BackwardPass _backward;
    private readonly DeviceKvCache _cache;
    private readonly TokenBatch _batch = new(RowsMax);
    private readonly int[] _ids;

    public SampleRun(LoadedModel model, PeftConfig method, CompilerOptions? options = null, bool poisons = false, int tokens = 21)
    {
        _model = model;
        Adapter = new PeftAdapter(model.Backend, model.Config, method);
        foreach ((int site, AdapterTensor tensor) in Adapter.Tensors())
        {
            var random = new SeededRandom((ulong)((site * 31) + tensor.Spec.Name.Length));
            float[] values = [.. Enumerable.Range(0, (int)tensor.Spec.Count).Select(_ =>
                (tensor.Spec.Name == "ia3_l" ? 1f : 0f) + (0.25f * (float)random.NextGaussian()))];
            tensor.Upload(model.Backend, values);
        }

        _ids = TinyModel.Ids(tokens, 3);
        _run = new TrainingRun(
            model, Adapter,
            new TrainingPlan
            {
                Samples = [TrainingSample.FromTokens(_ids, [.. Enumerable.Repeat(true, tokens)])],
                Epochs = 1000,
                Optimizer = new SgdOptions(),
            },
            model.CompileTraining(Adapter.Networks, options));
        _forward = new ForwardPass(model, RowsMax, sampledMax: 4) { PoisonsFreed = poisons };
        _backward = new BackwardPass(model, RowsMax) { PoisonsFreed = poisons };
        _cache = CacheOf(model);
    }

    public IComputeBackend Backend => _model.Backend;

    public PeftAdapter Adapter { get; }

    public TrainingProgram Program => _run.Program;

    /// <summary>The sample.</summary>
    public int[] Ids => _ids;

    /// <summary>The request that runs beside the sample's windows.</summary>
    public int[] RequestIds => _ids[2..8];

    /// <summary>Logits of the request beside the last sample.</summary>
    public float[] Logits { get; } = new float[2 * TinyModel.Vocabulary];

    /// <summary>Logits of the last two tokens of a request without an adapter.</summary>
    public static float[] BareLogits(LoadedModel model, int[] ids)
    {
        using var forward = new ForwardPass(model, ids.Length, sampledMax: 2);
        using DeviceKvCache cache = CacheOf(model);
        var batch = new TokenBatch(ids.Length);
        batch.AddInference(ids, 0, cache, [0], adapter: null, sampled: 2);
        float[] logits = new float[2 * TinyModel.Vocabulary];
        model.Backend.Download(forward.Run(batch), logits);
        return logits;
    }

    /// <summary>Loss and gradients by name; windows are cut by the seed, in one piece where it is null.</summary>
    public (double Loss, Dictionary<string, float[]> Gradients) Run(ulong? windows = null)
    {
        var random = new SeededRandom(windows ?? 0);
        int Window(int left) => windows is null ? left : 1 + random.Next(left);
        bool isDue = false;
        while (!isDue)
        {
            TrainingCursor cursor = _run.Cursor;
            if (cursor.Phase == TrainingPhase.Backward)
            {
                isDue = _run.RunBackward(_backward, Window(cursor.RowsLeft));
                continue;
            }

            int count = Window(cursor.Sample.Ids.Length - cursor.PositionsDone);
            _batch.Clear();
            _batch.AddInference(RequestIds, 0, _cache, [2, 1, 0, 3], Adapter, sampled: 2);
            _run.AddForwardWindow(_batch, count);
            _model.Backend.Download(_forward.Run(_batch), Logits);
            _run.CompleteForward(count);
        }

        var gradients = new Dictionary<string, float[]>();
        foreach (int site in Adapter.SiteIndices)
        {
            foreach ((AdapterTensor tensor, DeviceTensor gradient) in Adapter[site]!.Tensors.Zip(_run.Gradients[site]))
            {
                float[] values = new float[tensor.Spec.Count];
                _model.Backend.Download(gradient, values);
                gradients.Add($"{AdapterSites.NameOf(site)}.{tensor.Spec.Name}", values);
            }
        }

        // A step of the smallest kind: it clears the gradients and moves nothing that matters to a single sample.
        _run.Gradients.Zero(_model.Backend);
        float[][] weights = [.. Adapter.Tensors().Select(t => Host(t.Tensor))];
        _run.Step();
        foreach ((float[] values, (int, AdapterTensor Tensor) t) in weights.Zip(Adapter.Tensors()))
        {
            t.Tensor.Upload(_model.Backend, values);
        }

        return (_run.LastLoss, gradients);
    }

    private static DeviceKvCache CacheOf(LoadedModel model) =>
        model.Backend.CreateKvCache(model.Config.LayerCount, 4, model.Config.KeyValueHeads, model.Config.HeadDim);

    public float[] Host(AdapterTensor tensor)
    {
        float[] values = new float[tensor.Spec.Count];
        _model.Backend.Download(tensor.Values, values);
        return values;
    }

    public void Dispose()
    {
        _run.Dispose();
        _forward.Dispose();
        _backward.Dispose();
        _cache.Dispose();
    }
}
