using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends;

/// <summary>
/// What the backend contract does not say about a bypass: LoRA composed of small operations has the bits of the fused one,
/// shapes beyond every block keep their bits, and a steady load allocates nothing.
/// </summary>
[TestFixture]
internal sealed class CpuBypassTests
{
    private const int Rows = 203;
    private const int In = 1123;
    private const int Out = 619;

    [Test]
    public void ComposedLora_ForwardAndBackward_HasTheBitsOfTheFusedOne(
        [Values(1, 8, 16, 40)] int rank, [Values(1, 7, 110)] int rows)
    {
        const float Scale = 0.7f;
        using CpuBackend backend = new(2);
        using Bench bench = new(backend);
        (DeviceFactor a, DeviceFactor b) = (bench.Factor(1, rank, 301), bench.Factor(2, rank, 93));
        (DeviceTensor x, DeviceTensor dy) = (bench.Tensor(3, rows, 301), bench.Tensor(4, rows, 93));
        (DeviceTensor fusedY, DeviceTensor y) = (bench.Tensor(5, rows, 93), bench.Tensor(5, rows, 93));
        (DeviceTensor fusedDx, DeviceTensor dx) = (bench.Tensor(6, rows, 301), bench.Tensor(6, rows, 301));
        (DeviceTensor fusedGradA, DeviceTensor gradA) = (bench.Tensor(7, rank, 301), bench.Tensor(7, rank, 301));
        (DeviceTensor fusedGradB, DeviceTensor gradB) = (bench.Tensor(8, rank, 93), bench.Tensor(8, rank, 93));
        backend.LoraBypass(x, [new LoraSegment(0, rows, a, b, Scale)], fusedY);
        backend.LoraBypassBackward(x, dy, a, b, Scale, fusedGradA, fusedGradB, fusedDx);

        (DeviceTensor u, DeviceTensor du) = (bench.Tensor(9, rows, rank), bench.Tensor(9, rows, rank));
        backend.Narrow(x, a, Scale, u, accumulate: false);
        backend.Widen(u, b, 1f, y, accumulate: true);
        backend.Narrow(dy, b, Scale, du, accumulate: false);
        backend.AddOuter(du, x, 1f, gradA);
        backend.AddOuter(u, dy, 1f, gradB);
        backend.Widen(du, a, 1f, dx, accumulate: true);

        Assert.That(bench.Bits(y), Is.EqualTo(bench.Bits(fusedY)), "y");
        Assert.That(bench.Bits(gradA), Is.EqualTo(bench.Bits(fusedGradA)), "gradient of A");
        Assert.That(bench.Bits(gradB), Is.EqualTo(bench.Bits(fusedGradB)), "gradient of B");
        Assert.That(bench.Bits(dx), Is.EqualTo(bench.Bits(fusedDx)), "dx");
    }

    [Test]
    public void FactorProducts_BeyondEveryBlock_KeepBitsForRowsAndThreads(
        [Values(5, 71)] int inner, [Values(1f, 0.3f)] float scale)
    {
        int[] whole = Products(1, inner, scale, [Rows]);
        Assert.That(Products(3, inner, scale, [Rows]), Is.EqualTo(whole), "3 threads");
        Assert.That(Products(2, inner, scale, [1, 64, 100, 38]), Is.EqualTo(whole), "cut");
        Assert.That(Products(2, inner, scale, [97, 2, 4, 100]), Is.EqualTo(whole), "cut otherwise");
    }

    [Test]
    public void Operations_SteadyState_AllocateNothing()
    {
        using CpuBackend backend = new(2);
        using Bench bench = new(backend);
        DeviceFactor m = bench.Factor(1, 21, In);
        (DeviceTensor x, DeviceTensor y) = (bench.Tensor(2, Rows, In), bench.Tensor(3, Rows, In));
        (DeviceTensor u, DeviceTensor gradient) = (bench.Tensor(4, Rows, 21), bench.Tensor(5, 21, In));
        (DeviceTensor gain, DeviceTensor sums) = (bench.Tensor(6, 1, In), bench.Tensor(7, 1, In));
        DeviceTensor packed = bench.Tensor(8, Rows, PackedFormats.PackedColumns(In, PackedFormat.BF16));
        DeviceTensor bits = bench.Tensor(9, Rows, PackedFormats.PackedColumns(In, PackedFormat.SignBits));
        long managed = 0;
        long native = 0;
        for (int round = 0; round < 3; round++)
        {
            // From the second round on nothing may grow.
            long before = GC.GetAllocatedBytesForCurrentThread();
            native = round == 1 ? backend.AllocatedBytes : native;
            backend.Narrow(x, m, 0.5f, u, accumulate: true);
            backend.Widen(u, m, 0.5f, y, accumulate: true);
            backend.AddOuter(u, x, 0.5f, gradient);
            backend.AddBias(y, gain);
            backend.AddColumnSums(y, sums);
            backend.ScaleColumns(x, gain, y, accumulate: true);
            backend.ScaleColumnsBackward(x, y, gain, sums, y, accumulate: false);
            backend.Relu(x, y);
            backend.ReluBackward(x, y, y);
            backend.Silu(x, y);
            backend.SiluBackward(x, y, y);
            backend.Pack(x, PackedFormat.BF16, packed);
            backend.Unpack(packed, PackedFormat.BF16, y);
            backend.Pack(x, PackedFormat.SignBits, bits);
            backend.Unpack(bits, PackedFormat.SignBits, y);
            backend.CopyColumns(x, 3, y, 7, 500);
            managed = GC.GetAllocatedBytesForCurrentThread() - before;
        }

        Assert.That(managed, Is.Zero);
        Assert.That(backend.AllocatedBytes, Is.EqualTo(native));
    }

    // All three products over the rows in the given windows, those of the gradient from the end.
    private static int[] Products(int threads, int inner, float scale, int[] windows)
    {
        using CpuBackend backend = new(threads);
        using Bench bench = new(backend);
        (DeviceFactor narrow, DeviceFactor widen) = (bench.Factor(1, inner, In), bench.Factor(2, inner, Out));
        (DeviceTensor x, DeviceTensor u) = (bench.Tensor(3, Rows, In), bench.Tensor(4, Rows, inner));
        (DeviceTensor y, DeviceTensor gradient) = (bench.Tensor(5, Rows, Out), bench.Tensor(6, inner, In));
        int start = Rows;
        foreach (int length in windows.Reverse())
        {
            start -= length;
            backend.Narrow(x.Slice(start, length), narrow, scale, u.Slice(start, length), accumulate: true);
            backend.Widen(u.Slice(start, length), widen, scale, y.Slice(start, length), accumulate: true);
            backend.AddOuter(u.Slice(start, length), x.Slice(start, length), scale, gradient);
        }

        return [.. bench.Bits(u), .. bench.Bits(y), .. bench.Bits(gradient)];
    }

    /// <summary>Tensors of a test, filled with numbers that follow from a seed.</summary>
    private sealed class Bench(CpuBackend backend) : IDisposable
    {
        private readonly ResourceSet _owned = new();

        public DeviceTensor Tensor(ulong seed, int rows, int columns)
        {
            DeviceTensor tensor = _owned.Add(backend.Allocate(rows, columns));
            backend.Upload(Numbers(seed, rows * columns), tensor);
            return tensor;
        }

        public DeviceFactor Factor(ulong seed, int inner, int wide)
        {
            DeviceFactor factor = _owned.Add(backend.CreateFactor(inner, wide));
            backend.Upload(Numbers(seed, inner * wide), factor.Values);
            backend.RefreshFactor(factor);
            return factor;
        }

        public int[] Bits(DeviceTensor tensor)
        {
            float[] numbers = new float[tensor.Rows * tensor.Columns];
            backend.Download(tensor, numbers);
            return Array.ConvertAll(numbers, BitConverter.SingleToInt32Bits);
        }

        public void Dispose() => _owned.Dispose();

        private static float[] Numbers(ulong seed, int count)
        {
            SeededRandom random = new(seed);
            float[] numbers = new float[count];
            for (int i = 0; i < count; i++)
            {
                numbers[i] = random.NextSingle() - 0.5f;
            }

            return numbers;
        }
    }
}
