using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Models;

/// <summary>
/// Which modules have a bypass decides which instructions a job runs. Bypasses whose B is zero change neither the function nor
/// any gradient, so a job on a few modules must have the gradients of one on all of them.
/// </summary>
[DeviceFixture(ModelArchitecture.Llama)]
[DeviceFixture(ModelArchitecture.Qwen2)]
[DeviceFixture(ModelArchitecture.Qwen3)]
internal sealed class TrainingGraphTests(ModelArchitecture architecture)
{
    private static readonly AdapterModule[] All = Enum.GetValues<AdapterModule>();

    private TinyModel _files = null!;
    private IComputeBackend _backend = null!;
    private LoadedModel _model = null!;

    private static IEnumerable<AdapterModule[]> Subsets()
    {
        // Every way to leave modules out that changes the shape of the backward pass is among these 127.
        for (int mask = 1; mask < 1 << All.Length; mask++)
        {
            yield return [.. All.Where(m => (mask & (1 << (int)m)) != 0)];
        }
    }

    [OneTimeSetUp]
    public void SetUp()
    {
        _files = new TinyModel(architecture, layers: 2);
        _backend = TestDevice.CreateBackend(1);
        _model = _files.Load(_backend);
    }

    [OneTimeTearDown]
    public void TearDown()
    {
        _model.Dispose();
        Assert.That(_backend.AllocatedBytes, Is.LessThan(1 << 20), "every run gave back its memory");
        _backend.Dispose();
        _files.Dispose();
    }

    [Test]
    public void Gradients_OfEverySubsetOfModules_EqualThoseOfAllModules()
    {
        foreach (AdapterModule[] subset in Subsets())
        {
            Dictionary<string, float[]> expected = Gradients(subset, All);
            foreach ((string name, float[] gradient) in Gradients(subset, subset))
            {
                Assert.That(gradient.AsSpan().SequenceEqual(expected[name]), $"{name} of {string.Join(' ', subset)}");
                Assert.That(gradient, Has.Some.Not.Zero, name);
            }
        }
    }

    /// <summary>Gradients of a job whose graph has bypasses at these modules; B is zero but at the trained ones.</summary>
    private Dictionary<string, float[]> Gradients(AdapterModule[] trained, AdapterModule[] bypassed)
    {
        var adapter = new PeftAdapter(
            _backend,
            _files.Config,
            new LoraConfig { Rank = 2, TargetModules = [.. bypassed.Select(m => AdapterSites.ModuleNames[(int)m])] });
        foreach (int site in adapter.SiteIndices)
        {
            var random = new SeededRandom((ulong)site + 1);
            foreach (AdapterTensor tensor in adapter[site]!.Tensors)
            {
                if (tensor.Spec.Name == "lora_A" || trained.Contains(AdapterSites.ModuleOf(site)))
                {
                    _backend.Upload(Random((int)tensor.Spec.Count, ref random), tensor.Values);
                }

                tensor.Refresh(_backend);
            }
        }

        int[] ids = TinyModel.Ids(11, 3);
        var plan = new TrainingPlan
        {
            Samples = [TrainingSample.FromTokens(ids, [.. Enumerable.Repeat(true, ids.Length)])],
            Optimizer = new SgdOptions(),
        };
        using var run = new TrainingRun(_model, adapter, plan);
        using var forward = new ForwardPass(_model, 16, sampledMax: 0);
        using var backward = new BackwardPass(_model, 16);
        var batch = new TokenBatch(16);
        run.AddForwardWindow(batch, ids.Length);
        forward.Run(batch);
        run.CompleteForward(ids.Length);
        while (!run.RunBackward(backward, run.Cursor.RowsLeft))
        {
        }

        var gradients = new Dictionary<string, float[]>();
        foreach (int site in adapter.SiteIndices)
        {
            gradients.Add($"A of {AdapterSites.NameOf(site)}", Host(run.Gradients[site][0]));
            gradients.Add($"B of {AdapterSites.NameOf(site)}", Host(run.Gradients[site][1]));
        }

        return gradients;
    }

    private static float[] Random(int count, ref SeededRandom random)
    {
        float[] values = new float[count];
        for (int i = 0; i < count; i++)
        {
            values[i] = (float)random.NextGaussian() * 0.2f;
        }

        return values;
    }

    private float[] Host(DeviceTensor tensor)
    {
        float[] values = new float[tensor.Rows * tensor.Columns];
        _backend.Download(tensor, values);
        return values;
    }
}
