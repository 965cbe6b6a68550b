using FlexLLM.Backends;
using FlexLLM.Backends.Torch;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>
/// Products with BF16 weights as a GPU makes them, here on the CPU: operands rounded to BF16, the result too, and rows that several
/// weights multiply rounded once.
/// </summary>
[TorchFixture]
internal sealed class SharedRoundingTests
{
    // In units of 2^-24: four times half the spacing of BF16 at 1. libtorch's products on the CPU round sums on the way too, and were off
    // by three.
    private const double Bf16Roundings = 4 << 16;
    private const int Rows = 4;
    private const int Wide = 32;

    private TorchComputeBackend _backend = null!;
    private Workbench _bench = null!;
    private DeviceTensor _arena = null!;

    [SetUp]
    public void SetUp() => Open(DType.F32);

    [TearDown]
    public void TearDown()
    {
        _bench.Dispose();
        _backend.Dispose();
    }

    [Test]
    public void Linear_BF16Weight_IsTheProductOfRoundedOperands(
        [Values] bool bias, [Values] bool accumulate, [Values(DType.F32, DType.BF16)] DType activations)
    {
        Reopen(activations);
        (Matrix x, Matrix b, Matrix before) = (_bench.Random(5, 37), _bench.Random(1, 29), _bench.Random(5, 29));
        (DeviceWeight weight, Matrix w) = _bench.RandomWeight(29, 37, DType.BF16);
        Operand y = accumulate ? _bench.Target(before) : _bench.Output(5, 29);
        _backend.Linear(_bench.Source(x), weight, bias ? _bench.Constant(b) : null, y, accumulate);
        Matrix expected = Reference.Linear(x.Rounded(DType.BF16), w, bias ? b : null);
        Matrix magnitude = Reference.Linear(x.Abs(), w.Abs(), b.Abs());
        Matrix actual = accumulate ? Difference(y.Read(), before) : y.Read();
        actual.Type = DType.F32; // That it is rounded is allowed for already.
        Expect.Close("linear", actual, expected, magnitude, Bf16Roundings);
        Assert.Throws<AssertionException>(
            () => Expect.Close("linear", actual, expected, magnitude, Expect.Roundings(37)), "Control: the result is rounded.");
        _bench.Verify();
    }

    [Test]
    public void LinearBackwardInputAndLogits_BF16Weight_AreProductsOfRoundedOperands([Values(DType.F32, DType.BF16)] DType activations)
    {
        Reopen(activations);
        (Matrix dy, Matrix x) = (_bench.Random(5, 29), _bench.Random(5, 37));
        (DeviceWeight weight, Matrix w) = _bench.RandomWeight(29, 37, DType.BF16);
        (Operand dx, Operand logits) = (_bench.Output(5, 37), _bench.Output(2, 29, TensorUse.Exact));
        _backend.LinearBackwardInput(_bench.Source(dy), weight, dx, accumulate: false);
        _backend.Logits(_bench.Source(x), [3, 1], weight, logits);
        Expect.Close(
            "dx", dx.Read(), Reference.LinearBackwardInput(dy.Rounded(DType.BF16), w), Reference.LinearBackwardInput(dy.Abs(), w.Abs()),
            Bf16Roundings);
        Expect.Close(
            "logits", logits.Read(), Reference.Logits(x.Rounded(DType.BF16), [3, 1], w), Reference.Logits(x.Abs(), [3, 1], w.Abs()),
            Bf16Roundings);
        _bench.Verify();
    }

    // All in one arena, as the forward pass has them, with an adapter's product between.
    [Test]
    public void Linear_SameRowsAgain_AreRoundedOnce()
    {
        DeviceTensor[] slots = Slots(4);
        DeviceWeight weight = _bench.RandomWeight(Wide, Wide, DType.BF16).Weight;
        LoraSegment[] lora = [new(1, 2, _bench.Factor(_bench.Random(4, Wide)), _bench.Factor(_bench.Random(4, Wide)), 0.5f)];
        for (int i = 1; i < slots.Length; i++)
        {
            _backend.Linear(slots[0], weight, null, slots[i], accumulate: false);
            _backend.LoraBypass(slots[0], lora, slots[i]);
        }

        Assert.That(_backend.Roundings, Is.EqualTo(1));
        Assert.That(Read(slots[3]), Is.EqualTo(Read(slots[1])));
        _backend.Linear(slots[0].Slice(0, 2), weight, null, slots[1].Slice(0, 2), accumulate: false);
        Assert.That(_backend.Roundings, Is.EqualTo(2), "Other rows.");
    }

    [Test]
    public void Linear_RowsWrittenSince_AreRoundedAgain(
        [Values("Upload", "Copy", "Add", "RmsNorm", "Product", "OtherView", "Rope")] string writer)
    {
        DeviceTensor[] slots = Slots(3);
        DeviceWeight weight = _bench.RandomWeight(Wide, Wide, DType.BF16).Weight;
        DeviceTensor gain = _bench.Constant(_bench.Random(1, Wide));
        DeviceTensor table = _bench.Constant(_bench.Random(3, 8));
        _backend.Linear(slots[0], weight, null, slots[1], accumulate: false);
        switch (writer)
        {
            case "Upload":
                _backend.Upload(_bench.Random(1, Wide).ToFloats(), slots[0].Slice(Rows - 1, 1));
                break;
            case "Copy":
                _backend.Copy(slots[2], slots[0]);
                break;
            case "Add":
                _backend.Add(slots[0], slots[2], slots[0]);
                break;
            case "RmsNorm":
                _backend.RmsNorm(slots[2], gain, 1e-5f, slots[0]);
                break;
            case "Product":
                _backend.Linear(slots[2], weight, null, slots[0], accumulate: true);
                break;
            case "OtherView":
                _backend.Zero(_backend.View(_arena, 16, 1, 16));
                break;
            default:
                _backend.Rope(slots[0], [2, 0, 1, 2], table, inverse: false);
                break;
        }

        _backend.Linear(slots[0], weight, null, slots[1], accumulate: false);
        float[] after = Read(slots[1]);
        DeviceTensor fresh = _bench.Own(_backend.Allocate(Rows, Wide));
        _backend.Copy(slots[0], fresh);
        _backend.Linear(fresh, weight, null, slots[1], accumulate: false);
        Assert.That(after, Is.EqualTo(Read(slots[1])));
    }

    [Test]
    public void Dispose_OwnerOfRoundedRows_LeavesNoTensor()
    {
        DeviceWeight weight = _bench.RandomWeight(Wide, Wide, DType.BF16).Weight;
        DeviceTensor y = _bench.Own(_backend.Allocate(Rows, Wide));
        Multiply();
        long before = torch.Tensor.TotalCount;
        Multiply();
        Assert.That(torch.Tensor.TotalCount, Is.EqualTo(before));
        Assert.That(_backend.Roundings, Is.EqualTo(2));

        void Multiply()
        {
            using DeviceTensor x = _backend.Allocate(Rows, Wide);
            _backend.Linear(x, weight, null, y, accumulate: false);
        }
    }

    [Test]
    public void Linear_BF16Activations_AreRoundedNowhere()
    {
        Reopen(DType.BF16);
        (Operand x, Operand y) = (_bench.Source(_bench.Random(5, Wide)), _bench.Output(5, Wide));
        _backend.Linear(x, _bench.RandomWeight(Wide, Wide, DType.BF16).Weight, null, y, accumulate: false);
        Assert.That(_backend.Roundings, Is.Zero);
        using TorchComputeBackend wide = new(new torch.Device(DeviceType.CPU));
        Assert.That(_backend.PeerKind, Is.Not.EqualTo(wide.PeerKind), "Copies would not keep all bits.");
        _bench.Verify();
    }

    [TestCase(DType.F32)]
    [TestCase(DType.BF16)]
    public void CrossEntropy_BF16Head_IsThatOfRoundedOperands(DType activations)
    {
        Reopen(activations);
        Matrix x = _bench.Random(7, 37);
        (DeviceWeight weight, Matrix head) = _bench.RandomWeight(29, 37, DType.BF16);
        int[] targets = [3, -1, 28, 0, -1, 7, 7];
        (Operand dx, Operand losses) = (_bench.Output(7, 37), _bench.Output(7, 1, TensorUse.Exact));
        _backend.FusedLinearCrossEntropy(_bench.Source(x), targets, weight, 0.5f, dx, losses);
        Matrix rounded = x.Rounded(DType.BF16);
        Assert.That(losses.Read().Values, Is.EqualTo(Reference.CrossEntropy(rounded, targets, head)).Within(0.05));
        Matrix gradient = Reference.CrossEntropyBackward(rounded, targets, head, 0.5f);
        Expect.Close("loss dx", dx.Read(), gradient, gradient.Map(_ => 1), 2 * Bf16Roundings);
        _bench.Verify();
    }

    private void Open(DType activations)
    {
        _backend = new TorchComputeBackend(new torch.Device(DeviceType.CPU), multipliesBf16: true, activationType: activations);
        _bench = new Workbench(_backend);
    }

    private void Reopen(DType activations)
    {
        TearDown();
        Open(activations);
    }

    // Matrices of random numbers in one arena.
    private DeviceTensor[] Slots(int count)
    {
        _arena = _bench.Own(_backend.Allocate(Rows, count * Wide));
        _backend.Upload(_bench.Random(Rows, count * Wide).ToFloats(), _arena);
        return [.. Enumerable.Range(0, count).Select(i => _backend.View(_arena, (long)i * Rows * Wide, Rows, Wide))];
    }

    private float[] Read(DeviceTensor tensor)
    {
        float[] values = new float[tensor.Rows * tensor.Columns];
        _backend.Download(tensor, values);
        return values;
    }

    private static Matrix Difference(Matrix a, Matrix b)
    {
        Matrix difference = a.Copy();
        for (int i = 0; i < b.Values.Length; i++)
        {
            difference.Values[i] -= b.Values[i];
        }

        return difference;
    }
}
