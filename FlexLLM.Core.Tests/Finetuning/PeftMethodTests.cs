using System.Numerics.Tensors;
using System.Runtime.InteropServices;
using FlexLLM.Backends;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>
/// The bits of every PEFT method's gradients on the CPU backend under everything that the passes may do to a graph. That they are
/// the right ones is checked by <see cref="PeftReferenceTests"/>.
/// </summary>
[DeviceFixture(ModelArchitecture.Llama)]
[DeviceFixture(ModelArchitecture.Qwen2)]
[DeviceFixture(ModelArchitecture.Qwen3)]
internal sealed class PeftMethodTests(ModelArchitecture architecture)
{
    private static readonly PeftConfig[] Methods = PeftMethods.All;

    private TinyModel _files = null!;
    private IComputeBackend _backend = null!;
    private LoadedModel _model = null!;

    [OneTimeSetUp]
    public void SetUp()
    {
        _files = new TinyModel(architecture, layers: 3);
        _backend = TestDevice.CreateBackend(1);
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
                Assert.That(again, Is.EqualTo(loss).Within(TestDevice.Tolerance), $"{method}, {options}");
                Assert.That(run.Logits, Is.EqualTo(logits).Within(TestDevice.Tolerance));
                AssertSame(gradients, expected, $"{method}, {options}, windows {windows}");
            }
        }

        Assert.That(saved[0], Is.EqualTo(saved[1]).And.GreaterThan(saved[2]), "the unpruned graph saves most");
        Assert.That(saved[2], Is.GreaterThanOrEqualTo(columns));
        Assert.That(saved[^1], Is.LessThan(columns), "a budget forces more to be computed again");
        Assert.That(saved.Skip(3), Is.Ordered.Descending);
    }

    [Test]
    public void Unpruned_ComputesWhatPruningLeavesOut([ValueSource(nameof(Methods))] PeftConfig method)
    {
        using var pruned = new SampleRun(_model, method);
        using var run = new SampleRun(_model, method, new CompilerOptions { Prunes = false });
        OpKind[] ops = [.. run.Program.Layers.SelectMany(l => l).Select(i => i.Op)];
        Assert.That(ops.Count(o => o == OpKind.LinearBackwardWeight), Is.EqualTo(7 * _model.Config.LayerCount));
        Assert.That(pruned.Program.Layers.SelectMany(l => l).Select(i => i.Op),
            Has.None.AnyOf(OpKind.LinearBackwardWeight, OpKind.RmsNormBackwardGain));
        Assert.That(run.Program.Layers[0].Select(i => i.Op), Does.Contain(OpKind.AttentionBackward), "it goes down to the embedding");
    }

    [Test]
    public void Passes_FreedMemoryIsPoisoned_NothingReadsIt([ValueSource(nameof(Methods))] PeftConfig method)
    {
        using var plain = new SampleRun(_model, method);
        (double loss, Dictionary<string, float[]> expected) = plain.Run();
        float[] logits = [.. plain.Logits];
        foreach (CompilerOptions options in Options(plain.Program.SavedColumns))
        {
            using var run = new SampleRun(_model, method, options, poisons: true);
            foreach (ulong windows in new ulong[] { 5, 6 })
            {
                (double again, Dictionary<string, float[]> gradients) = run.Run(windows);
                Assert.That(again, Is.EqualTo(loss).Within(TestDevice.Tolerance));
                Assert.That(run.Logits, Is.EqualTo(logits).Within(TestDevice.Tolerance));
                AssertSame(gradients, expected, $"{method}, {options}, windows {windows}");
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
    public void Passes_SlotOfTheForwardPassFreedTooEarly_IsNoticed()
    {
        var body = (List<Instruction>)_model.Program.Body;
        int reader = body.FindIndex(i => i.Op == OpKind.SiluGate && i.Layer == 1);
        Instruction before = body[reader - 1];
        Assert.That(body[reader].Frees, Does.Contain(body[reader].Inputs[1].Index));
        body[reader - 1] = before with { Frees = [.. before.Frees, body[reader].Inputs[1].Index] };
        try
        {
            using var run = new SampleRun(_model, Methods[2], poisons: true);
            Assert.That(run.Run().Loss, Is.NaN);
            Assert.That(run.Logits, Is.All.NaN);
        }
        finally
        {
            body[reader - 1] = before;
        }
    }

    [Test]
    public void Gradients_SavedAsBF16_AreNearAndHalfTheBytes([ValueSource(nameof(Methods))] PeftConfig method)
    {
        using var plain = new SampleRun(_model, method);
        (double loss, Dictionary<string, float[]> expected) = plain.Run();
        using var run = new SampleRun(_model, method, new CompilerOptions { StoresSavedAsBF16 = true });
        (double again, Dictionary<string, float[]> gradients) = run.Run(1);
        Assert.That(again, Is.EqualTo(loss).Within(TestDevice.Tolerance), "the forward pass reads nothing of it");
        double error = 0;
        double norm = 0;
        foreach ((string name, float[] values) in expected)
        {
            error += values.Zip(gradients[name]).Sum(p => Math.Pow((double)p.First - p.Second, 2));
            norm += values.Sum(v => (double)v * v);
        }

        double relative = Math.Sqrt(error / norm);

        // Eight bits of a mantissa give less than a hundredth. Large scores make more of it: an error of q times |score| is one of
        // exp(score), and LoRA on queries and keys without head norms has the largest.
        double bound = method.TargetModules.Count == 7 && architecture != ModelArchitecture.Qwen3 ? 0.08 : 0.01;
        TestContext.Out.WriteLine($"{architecture}, {method}: relative error {relative:E2}, " +
            $"{run.Program.SavedColumns} columns instead of {plain.Program.SavedColumns}");
        Assert.That(relative, Is.GreaterThan(0).And.LessThan(bound));
        Assert.That(run.Program.SavedColumns, Is.LessThan(0.56 * plain.Program.SavedColumns));
    }

    // Unpruned, with nothing dropped, then under budgets down to what no operation can make again, packed and not.
    private static IEnumerable<CompilerOptions> Options(long columns)
    {
        var keepsAll = new RematerializationOptions { DropsCheap = false };
        yield return new CompilerOptions { Prunes = false, Rematerialization = keepsAll, Compresses = false };
        yield return new CompilerOptions { Prunes = false, Rematerialization = keepsAll };
        yield return new CompilerOptions { Rematerialization = keepsAll, Compresses = false };
        yield return new CompilerOptions { Compresses = false };
        foreach (double share in new[] { 1, 0.9, 0.75, 0.6, 0.45, 0.3, 0 })
        {
            yield return new CompilerOptions
            {
                Rematerialization = new RematerializationOptions { SavedColumnsMax = (long)(share * columns) },
                Compresses = share is not (0.75 or 0.3),
            };
        }
    }

    // Zeros of both signs are told apart; but a device that promises values is held to values.
    private static void AssertSame(Dictionary<string, float[]> gradients, Dictionary<string, float[]> expected, string what)
    {
        Assert.That(gradients.Keys, Is.EqualTo(expected.Keys));
        foreach ((string name, float[] values) in expected)
        {
            ReadOnlySpan<byte> bits = MemoryMarshal.AsBytes<float>(gradients[name]);
            bool same = TestDevice.IsManaged
                ? bits.SequenceEqual(MemoryMarshal.AsBytes<float>(values))
                : TensorPrimitives.Distance<float>(gradients[name], values) <= TestDevice.Tolerance * TensorPrimitives.Norm<float>(values);
            Assert.That(same, $"{what}: {name}");
            Assert.That(values.All(float.IsFinite), name);
        }
    }
}
