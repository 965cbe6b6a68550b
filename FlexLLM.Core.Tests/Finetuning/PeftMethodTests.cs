using FlexLLM.Adapters;
using FlexLLM.Backends.Cpu;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>
/// Every PEFT method on the CPU backend: gradients against finite differences, and their bits under everything that the passes
/// may do to a graph.
/// </summary>
[TestFixture(ModelArchitecture.Llama)]
[TestFixture(ModelArchitecture.Qwen2)]
[TestFixture(ModelArchitecture.Qwen3)]
internal sealed class PeftMethodTests(ModelArchitecture architecture)
{
    private static readonly PeftConfig[] Methods = PeftMethods.All;

    private TinyModel _files = null!;
    private CpuBackend _backend = null!;
    private LoadedModel _model = null!;

    [OneTimeSetUp]
    public void SetUp()
    {
        _files = new TinyModel(architecture, layers: 3);
        _backend = new CpuBackend(1);
        _model = _files.Load(_backend);
    }

    [OneTimeTearDown]
    public void TearDown()
    {
        _model.Dispose();
        _backend.Dispose();
        _files.Dispose();
    }

    [Test]
    public void Gradients_EveryTensor_EqualFiniteDifferences([ValueSource(nameof(Methods))] PeftConfig method)
    {
        using var run = new SampleRun(_model, method);
        Dictionary<string, float[]> gradients = run.Run().Gradients;
        foreach ((string name, double analytic, double numeric) in Derivatives(run, gradients))
        {
            Assert.That(numeric, Is.EqualTo(analytic).Within(ToleranceOf(analytic)), $"{method}: {name}");
        }
    }

    [Test]
    public void Gradients_PlantedFault_IsNoticed()
    {
        using var run = new SampleRun(_model, Methods[2]);
        Dictionary<string, float[]> gradients = run.Run().Gradients;
        string victim = Derivatives(run, gradients).MaxBy(d => Math.Abs(d.Analytic)).Name;
        gradients[victim] = [.. gradients[victim].Select(v => v * 1.05f)];
        (string _, double analytic, double numeric) = Derivatives(run, gradients).Single(d => d.Name == victim);
        Assert.That(Math.Abs(numeric - analytic), Is.GreaterThan(ToleranceOf(analytic)));
    }

    [Test]
    public void Gradients_UnderAllThatPassesDo_HaveTheSameBits([ValueSource(nameof(Methods))] PeftConfig method)
    {
        using var plain = new SampleRun(_model, method);
        (double loss, Dictionary<string, float[]> expected) = plain.Run();
        float[] logits = [.. plain.Logits];
        long columns = plain.Program.SavedColumns;
        var saved = new List<long>();
        foreach (CompilerOptions options in Options(columns))
        {
            using var run = new SampleRun(_model, method, options);
            saved.Add(run.Program.SavedColumns);
            foreach (ulong? windows in new ulong?[] { null, 1, 2 })
            {
                (double again, Dictionary<string, float[]> gradients) = run.Run(windows);
                Assert.That(again, Is.EqualTo(loss), $"{method}, {options}");
                Assert.That(run.Logits, Is.EqualTo(logits));
                foreach ((string name, float[] values) in expected)
                {
                    Assert.That(gradients[name].AsSpan().SequenceEqual(values), $"{method}, {options}, windows {windows}: {name}");
                }
            }
        }

        Assert.That(saved[0], Is.GreaterThanOrEqualTo(saved[1]), "the unpruned graph saves most");
        Assert.That(saved[1], Is.GreaterThanOrEqualTo(columns));
        Assert.That(saved[^1], Is.LessThan(columns), "a budget forces more to be computed again");
        Assert.That(saved.Skip(2), Is.Ordered.Descending);
    }

    [Test]
    public void Passes_FreedMemoryIsPoisoned_NothingReadsIt([ValueSource(nameof(Methods))] PeftConfig method)
    {
        using var plain = new SampleRun(_model, method);
        (double loss, Dictionary<string, float[]> expected) = plain.Run();
        float[] logits = [.. plain.Logits];
        foreach (CompilerOptions options in Options(plain.Program.SavedColumns).Skip(1))
        {
            using var run = new SampleRun(_model, method, options, poisons: true);
            (double again, Dictionary<string, float[]> gradients) = run.Run(5);
            Assert.That(again, Is.EqualTo(loss));
            Assert.That(run.Logits, Is.EqualTo(logits));
            foreach ((string name, float[] values) in expected)
            {
                Assert.That(gradients[name].AsSpan().SequenceEqual(values), $"{method}, {options}: {name}");
            }
        }
    }

    [Test]
    public void Passes_SlotFreedTooEarly_IsNoticed()
    {
        using var run = new SampleRun(_model, Methods[0], poisons: true);
        var layer = (List<Instruction>)run.Program.Layers[2];
        int reader = layer.FindIndex(i => i.Frees.Count > 0 && i.Inputs.Any(b => b.Kind == BufferKind.Slot && i.Frees.Contains(b.Index)));
        int slot = layer[reader].Frees[0];
        layer[reader - 1] = layer[reader - 1] with { Frees = [.. layer[reader - 1].Frees, slot] };
        Dictionary<string, float[]> gradients = run.Run().Gradients;
        Assert.That(gradients.Values.SelectMany(v => v), Has.Some.NaN);
    }

    [Test]
    public void Gradients_SavedAsBF16_AreNearAndHalfTheBytes([ValueSource(nameof(Methods))] PeftConfig method)
    {
        using var plain = new SampleRun(_model, method);
        Dictionary<string, float[]> expected = plain.Run().Gradients;
        using var run = new SampleRun(_model, method, new CompilerOptions { StoresSavedAsBF16 = true });
        Dictionary<string, float[]> gradients = run.Run(1).Gradients;
        double error = 0;
        double norm = 0;
        foreach ((string name, float[] values) in expected)
        {
            error += values.Zip(gradients[name]).Sum(p => Math.Pow((double)p.First - p.Second, 2));
            norm += values.Sum(v => (double)v * v);
        }

        double relative = Math.Sqrt(error / norm);
        TestContext.Out.WriteLine($"{architecture}, {method}: relative error {relative:E2}, " +
            $"{run.Program.SavedColumns} columns instead of {plain.Program.SavedColumns}");
        Assert.That(relative, Is.GreaterThan(0).And.LessThan(0.08));
        Assert.That(run.Program.SavedColumns, Is.LessThan(0.56 * plain.Program.SavedColumns));
    }

    private static IEnumerable<CompilerOptions> Options(long columns)
    {
        var keepsAll = new RematerializationOptions { DropsCheap = false };
        yield return new CompilerOptions { Prunes = false, Rematerialization = keepsAll, Compresses = false };
        yield return new CompilerOptions { Rematerialization = keepsAll, Compresses = false };
        foreach (double share in new[] { 1, 0.9, 0.7, 0.5, 0 })
        {
            yield return new CompilerOptions
            {
                Rematerialization = new RematerializationOptions { SavedColumnsMax = (long)(share * columns) },
            };
        }
    }

    // Along a random direction of each tensor: <gradient, direction> and the loss's central difference.
    private static IEnumerable<(string Name, double Analytic, double Numeric)> Derivatives(
        SampleRun run, Dictionary<string, float[]> gradients)
    {
        foreach ((int site, AdapterTensor tensor) in run.Adapter.Tensors().ToArray())
        {
            string name = $"{AdapterSites.NameOf(site)}.{tensor.Spec.Name}";
            float[] values = run.Host(tensor);
            var random = new SeededRandom((ulong)(site + 99));
            double[] direction = [.. values.Select(_ => random.NextGaussian())];
            double length = Math.Sqrt(direction.Sum(d => d * d));
            double analytic = direction.Zip(gradients[name]).Sum(p => p.First * p.Second) / length;
            double numeric = ((8 * (LossAt(+1) - LossAt(-1))) - (LossAt(+2) - LossAt(-2))) / (12 * Step);
            tensor.Upload(run.Backend, values);
            yield return (name, analytic, numeric);

            double LossAt(int steps)
            {
                tensor.Upload(run.Backend, [.. values.Zip(direction, (v, d) => (float)(v + (steps * Step * d / length)))]);
                return run.Run().Loss;
            }
        }
    }

    // A loss of about six is known to a millionth; the kinks of a ReLU within the steps cost a little more.
    private static double ToleranceOf(double derivative) => 2e-3 + (5e-3 * Math.Abs(derivative));

    private const double Step = 4e-3;
}
