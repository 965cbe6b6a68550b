using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Tests.Contracts;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>
/// Every PEFT method against a decoder of plain loops in double that reads the adapter's folder: logits, and gradients against
/// that decoder's finite differences, which are good to nine digits.
/// </summary>
[DeviceFixture(ModelArchitecture.Llama)]
[DeviceFixture(ModelArchitecture.Qwen2)]
[DeviceFixture(ModelArchitecture.Qwen3)]
internal sealed class PeftReferenceTests(ModelArchitecture architecture)
{
    private const double Step = 1e-5;

    // Of what F32 leaves of a gradient's length.
    private const double ErrorMax = 3e-5;

    private TinyModel _files = null!;
    private IComputeBackend _backend = null!;
    private LoadedModel _model = null!;
    private PlainDecoder _plain = null!;

    [OneTimeSetUp]
    public void SetUp()
    {
        _files = new TinyModel(architecture, layers: 3);
        _backend = TestDevice.CreateBackend(1);
        _model = _files.Load(_backend);
        _plain = new PlainDecoder(_files.Config, PlainDecoder.Read(Path.Combine(_files.Folder, "model.safetensors")));
    }

    [OneTimeTearDown]
    public void TearDown()
    {
        _model.Dispose();
        _backend.Dispose();
        _files.Dispose();
    }

    [TestCaseSource(typeof(PeftMethods), nameof(PeftMethods.All))]
    public void Gradients_EveryTensor_AreTheDerivativesOfThePlainLoss(PeftConfig method)
    {
        using var run = new SampleRun(_model, method);
        (double loss, Dictionary<string, float[]> gradients) = run.Run();
        Dictionary<string, Matrix> adapter = Saved(run.Adapter);
        Assert.That(loss, Is.EqualTo(_plain.Loss(run.Ids, method, adapter)).Within(1e-5));
        double worst = 0;
        foreach ((string name, Matrix gradient) in InFile(run.Adapter, gradients))
        {
            Assert.That(Length(gradient), Is.GreaterThan(1e-4), $"{name} has a gradient to compare");
            worst = Math.Max(worst, ErrorOf(name, gradient, run.Ids, method, adapter));
        }

        TestContext.Out.WriteLine($"{architecture}, {method}: {worst:E1} of a gradient's length");
        Assert.That(worst, Is.LessThan(ErrorMax));
    }

    [Test]
    public void Gradients_OneElementOfATensorWrong_IsNoticed([Range(0, 7)] int index)
    {
        PeftConfig method = PeftMethods.All[index];
        using var run = new SampleRun(_model, method);
        Dictionary<string, float[]> gradients = run.Run().Gradients;
        Dictionary<string, Matrix> adapter = Saved(run.Adapter);
        foreach ((string name, Matrix gradient) in InFile(run.Adapter, gradients).Take(5))
        {
            int largest = Array.FindIndex(gradient.Values, v => Math.Abs(v) == gradient.Abs().Max());
            gradient.Values[largest] *= 0.95;
            Assert.That(ErrorOf(name, gradient, run.Ids, method, adapter), Is.GreaterThan(ErrorMax), name);
        }
    }

    [TestCaseSource(typeof(PeftMethods), nameof(PeftMethods.All))]
    public void Logits_OfARequest_AreThoseOfThePlainDecoder(PeftConfig method)
    {
        using var run = new SampleRun(_model, method);
        run.Run(3);
        Matrix expected = _plain.Logits(run.RequestIds, method, Saved(run.Adapter)).Slice(run.RequestIds.Length - 2, 2);
        Matrix bare = _plain.Logits(run.RequestIds).Slice(run.RequestIds.Length - 2, 2);
        Assert.That(run.Logits, Is.EqualTo(expected.ToFloats()).Within(2e-5 * expected.Abs().Max()));
        Assert.That(run.Logits, Is.Not.EqualTo(bare.ToFloats()).Within(1e-2 * expected.Abs().Max()), "the adapter matters");
    }

    // LoRA and (IA)^3 can be merged: W + scale B A; diag(l) W and the bias with it; W diag(l).
    [TestCase(0)]
    [TestCase(1)]
    [TestCase(5)]
    [TestCase(6)]
    [TestCase(7)]
    public void Logits_OfARequest_AreThoseOfTheMergedModel(int index)
    {
        PeftConfig method = PeftMethods.All[index];
        using var run = new SampleRun(_model, method);
        run.Run();
        using var merged = new TinyModel(architecture, layers: 3);
        string path = Path.Combine(merged.Folder, "model.safetensors");
        Dictionary<string, Matrix> adapter = Saved(run.Adapter);
        foreach (string module in adapter.Keys.Select(ModuleOf).Distinct())
        {
            Merge(path, module, method, adapter);
        }

        using LoadedModel bare = merged.Load(_backend);
        float[] logits = SampleRun.BareLogits(bare, run.RequestIds);
        Assert.That(run.Logits, Is.EqualTo(logits).Within(1e-4 * logits.Max(Math.Abs)));
    }

    private static string ModuleOf(string tensor) => string.Join('.', tensor.Split('.')[2..7]);

    private static void Merge(string path, string module, PeftConfig method, Dictionary<string, Matrix> adapter)
    {
        string prefix = $"base_model.model.{module}";
        Matrix weight = PlainDecoder.Read(path)[$"{module}.weight"];
        if (method is LoraConfig lora)
        {
            Matrix delta = Reference.LinearBackwardInput(adapter[$"{prefix}.lora_B.weight"], adapter[$"{prefix}.lora_A.weight"]);
            ChangeAt(path, $"{module}.weight", (i, value) => (float)(value + (lora.Scale * delta.Values[i])));
            return;
        }

        double[] vector = adapter[$"{prefix}.ia3_l"].Values;
        bool isInput = ((Ia3Config)method).FeedforwardModules.Contains(module.Split('.')[^1]);
        ChangeAt(path, $"{module}.weight", (i, value) =>
            (float)(value * vector[isInput ? i % weight.Columns : i / weight.Columns]));
        if (!isInput && PlainDecoder.Read(path).ContainsKey($"{module}.bias"))
        {
            ChangeAt(path, $"{module}.bias", (i, value) => (float)(value * vector[i]));
        }
    }

    private static void ChangeAt(string path, string tensor, Func<int, float, float> change)
    {
        int index = 0;
        Weights.Change(path, tensor, value => change(index++, value));
    }

    // Along two random directions and along the gradient itself, which shows its length.
    private double ErrorOf(string name, Matrix gradient, int[] ids, PeftConfig method, Dictionary<string, Matrix> adapter)
    {
        var random = new SeededRandom((ulong)name.Length);
        double worst = 0;
        for (int i = 0; i < 3; i++)
        {
            Matrix direction = i == 0 ? gradient : Matrix.Random(ref random, gradient.Rows, gradient.Columns);
            double length = Length(direction);
            double numeric = (LossAt(Step) - LossAt(-Step)) / (2 * Step);
            worst = Math.Max(worst, Math.Abs(numeric - (gradient.Dot(direction) / length)) / Length(gradient));

            double LossAt(double step) => _plain.Loss(
                ids, method,
                new Dictionary<string, Matrix>(adapter) { [name] = adapter[name].Plus(direction.Map(d => step * d / length)) });
        }

        return worst;
    }

    private Dictionary<string, Matrix> Saved(PeftAdapter adapter)
    {
        PeftFolder.Save(_files["saved"], adapter.Config, PeftFolder.Download(adapter, _backend), baseModel: null);
        return PlainDecoder.Read(Path.Combine(_files["saved"], PeftFolder.WeightsFileName));
    }

    // Gradients under the names and in the shapes that a file gives the tensors.
    private static IEnumerable<(string Name, Matrix Gradient)> InFile(PeftAdapter adapter, Dictionary<string, float[]> gradients)
    {
        foreach ((int site, AdapterTensor tensor) in adapter.Tensors())
        {
            float[] values = gradients[$"{AdapterSites.NameOf(site)}.{tensor.Spec.Name}"];
            (int rows, int columns) = (Math.Max(1, tensor.Spec.Inner), tensor.Spec.Wide);
            bool isColumn = tensor.Spec.Name == "ia3_l" && adapter[site]!.Attachment == BypassAttachment.Output;
            yield return (PeftFolder.TensorName(site, tensor.Spec.Name),
                tensor.Spec.Widens ? Matrix.FromFloats(columns, rows, PeftFolder.Transpose(values, rows, columns))
                : isColumn ? Matrix.FromFloats(columns, 1, values)
                : Matrix.FromFloats(rows, columns, values));
        }
    }

    private static double Length(Matrix matrix) => Math.Sqrt(matrix.Dot(matrix));
}
