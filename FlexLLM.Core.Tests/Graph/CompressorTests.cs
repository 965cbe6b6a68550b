using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Graph;
using FlexLLM.Primitives;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>What is kept in fewer bytes: a bit an element where a ReLU's gradient is all that reads its output.</summary>
[TestFixture]
internal sealed class CompressorTests
{
    private const int Inner = 100;

    [Test]
    public void Compress_FrozenReluAboveABypass_KeepsBits()
    {
        ParallelGraph pruned = GraphPruner.Prune(Differentiator.Differentiate(FrozenRelu()));
        ParallelGraph packed = Compressor.Compress(pruned, storeAsBF16: false);
        Assert.That(Saved(pruned)["layers.0.relu"], Is.EqualTo(Inner));
        Assert.That(Saved(packed).Keys, Has.None.EqualTo("layers.0.relu"));
        Assert.That(Saved(packed)["layers.0.relu packed"], Is.EqualTo(4), "100 bits in 32-bit containers");
        Assert.That(packed.Values.Single(v => v.Packed is not null).Packed, Is.EqualTo(PackedFormat.SignBits));
        Assert.That(GraphPrinter.Print(packed), Does.Contain(
            "layers.0.relu unpacked = Unpack(layers.0.relu packed)\n" +
            "d layers.0.up = ReluBackward(d layers.0.relu, layers.0.relu unpacked)\n"));
    }

    [Test]
    public void Compress_OutputThatABypassReadsToo_StaysAsItIs()
    {
        ParallelGraph pruned = GraphPruner.Prune(Differentiator.Differentiate(FrozenRelu(secondBypassOnRelu: true)));
        Assert.That(Saved(Compressor.Compress(pruned, storeAsBF16: false))["layers.0.relu"], Is.EqualTo(Inner));
    }

    [Test]
    public void Compress_AsBF16_HalvesAllButTheLogSumExp()
    {
        ParallelGraph job = TrainingGraphs.Lora(TinyModel.ConfigOf(ModelArchitecture.Llama), [13]);
        ParallelGraph before = TrainingGraphs.After("rematerialize", job);
        ParallelGraph after = Compressor.Compress(before, storeAsBF16: true);
        foreach (GraphValue value in GraphPruner.SavedSet(after).Where(v => v.Packed is not null))
        {
            int columns = before.Values.First(v => $"{v.Name} packed" == value.Name).Columns;
            Assert.That(value.Columns, Is.EqualTo((columns + 1) / 2), value.Name);
        }

        Assert.That(after.Values.Where(v => v.Packed is not null), Is.Not.Empty);
    }

    [Test]
    public void ReluBackward_FromBits_HasTheBitsOfTheOneFromFloats([Values(1, 7, 33)] int rows)
    {
        using var backend = new CpuBackend(1);
        using DeviceTensor y = backend.Allocate(rows, Inner);
        using DeviceTensor dy = backend.Allocate(rows, Inner);
        using DeviceTensor bits = backend.Allocate(rows, PackedFormats.PackedColumns(Inner, PackedFormat.SignBits));
        using DeviceTensor dx = backend.Allocate(rows, Inner);
        var random = new SeededRandom(3);
        backend.Upload(Normal(rows, ref random), y);
        backend.Upload(Normal(rows, ref random), dy);
        backend.Relu(y, y);
        backend.ReluBackward(y, dy, dx);
        float[] expected = Host(backend, dx);
        backend.Pack(y, PackedFormat.SignBits, bits);
        backend.Unpack(bits, PackedFormat.SignBits, y);
        backend.ReluBackward(y, dy, dx);
        Assert.That(Host(backend, dx).AsSpan().SequenceEqual(expected));
        Assert.That(expected, Has.Some.Zero.And.Some.Not.Zero);
    }

    private static Dictionary<string, int> Saved(ParallelGraph graph) =>
        GraphPruner.SavedSet(graph).ToDictionary(v => v.Name, v => v.Columns);

    private static float[] Normal(int rows, ref SeededRandom random)
    {
        float[] values = new float[rows * Inner];
        for (int i = 0; i < values.Length; i++)
        {
            values[i] = (float)random.NextGaussian();
        }

        return values;
    }

    private static float[] Host(CpuBackend backend, DeviceTensor tensor)
    {
        float[] values = new float[tensor.Rows * tensor.Columns];
        backend.Download(tensor, values);
        return values;
    }

    // x + LoRA(x) -> frozen up -> ReLU -> frozen down -> loss: an MLP as OPT has it, which no model here has.
    private static ParallelGraph FrozenRelu(bool secondBypassOnRelu = false)
    {
        var b = new GraphBuilder();
        int table = b.Weight("embed", 24);
        int x = b.Activation(OpKind.Embed, "layers.0.input", 24, table);
        b.Layer = 0;
        int f = new BypassBuilder(b, 0, "layers.0.bypass", "low", new LoraNetwork(4), x, 24).Build();
        int y = b.Activation(OpKind.Add, "layers.0.sum", 24, x, f);
        int up = b.Activation(OpKind.Linear, "layers.0.up", Inner, y, b.Weight("w1", 24));
        int relu = b.Activation(OpKind.Relu, "layers.0.relu", Inner, up);
        int down = b.Activation(OpKind.Linear, "layers.0.down", 24, relu, b.Weight("w2", Inner));
        if (secondBypassOnRelu)
        {
            int g = new BypassBuilder(b, 1, "layers.0.second", "high", new LoraNetwork(4), relu, 24).Build();
            down = b.Activation(OpKind.Add, "layers.0.both", 24, down, g);
        }

        b.Layer = -1;
        int head = b.Weight("head", 24);
        int loss = b.Value("loss", ValueKind.Activation, 1);
        int gradient = b.Value("d last", ValueKind.Gradient, 24);
        b.Node(OpKind.CrossEntropy, [down, head], [loss, gradient]);
        return GraphVerifier.Verify(b.Build());
    }
}
