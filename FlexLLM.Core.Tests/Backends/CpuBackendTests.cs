using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends;

/// <summary>
/// What the backend contract does not reach: shapes beyond every blocking limit, against rows taken alone and other numbers
/// of threads, bit by bit; sampled elements against double; and memory.
/// </summary>
[TestFixture]
internal sealed class CpuBackendTests
{
    private const int Rows = 203;
    private const int In = 1123;
    private const int Out = 619;

    [Test]
    public void Linear_BeyondEveryBlock_KeepsBitsForRowsAndThreads([Values(DType.F32, DType.BF16)] DType type)
    {
        float[] all = Linear(1, 0, Rows, type);
        Assert.That(Bits(Linear(3, 0, Rows, type)), Is.EqualTo(Bits(all)));
        foreach ((int start, int count) in ((int, int)[])[(0, 1), (7, 2), (100, 3), (90, 11), (31, 101)])
        {
            float[] some = Linear(2, start, count, type);
            Assert.That(Bits(some), Is.EqualTo(Bits(all.AsSpan(start * Out, count * Out).ToArray())), $"rows from {start}");
        }
    }

    [Test]
    public void Linear_BeyondEveryBlock_IsTheProduct()
    {
        float[] y = Linear(2, 0, Rows, DType.F32);
        float[] x = Numbers(1, Rows * In);
        float[] w = Numbers(2, Out * In);
        float[] bias = Numbers(3, Out);
        for (int sample = 0; sample < 500; sample++)
        {
            int i = sample * 7919 % Rows;
            int o = sample * 104729 % Out;
            double exact = bias[o];
            for (int c = 0; c < In; c++)
            {
                exact += (double)x[(i * In) + c] * w[(o * In) + c];
            }

            Assert.That(y[(i * Out) + o], Is.EqualTo(exact).Within(1e-4), $"({i}, {o})");
        }
    }

    [Test]
    public void LinearBackwardInput_BeyondEveryBlock_KeepsBitsForRowsAndThreads([Values(DType.F32, DType.BF16)] DType type)
    {
        float[] all = BackwardInput(1, 0, Rows, type);
        Assert.That(Bits(BackwardInput(4, 0, Rows, type)), Is.EqualTo(Bits(all)));
        foreach ((int start, int count) in ((int, int)[])[(0, 1), (7, 2), (90, 11), (31, 101)])
        {
            float[] some = BackwardInput(2, start, count, type);
            Assert.That(Bits(some), Is.EqualTo(Bits(all.AsSpan(start * In, count * In).ToArray())), $"rows from {start}");
        }
    }

    [Test]
    public void LinearBackwardInput_BeyondEveryBlock_IsTheProduct()
    {
        float[] dx = BackwardInput(2, 0, Rows, DType.F32);
        float[] dy = Numbers(1, Rows * Out);
        float[] w = Numbers(2, Out * In);
        for (int sample = 0; sample < 500; sample++)
        {
            int i = sample * 7919 % Rows;
            int c = sample * 104729 % In;
            double exact = 0;
            for (int o = 0; o < Out; o++)
            {
                exact += (double)dy[(i * Out) + o] * w[(o * In) + c];
            }

            Assert.That(dx[(i * In) + c], Is.EqualTo(exact).Within(1e-4), $"({i}, {c})");
        }
    }

    [Test]
    public void Attention_ManyTilesAndChunks_KeepsBitsForWindowsAndThreads()
    {
        AttentionRun whole = new(1, [210]);
        Assert.That(new AttentionRun(3, [210]).Bits, Is.EqualTo(whole.Bits));
        Assert.That(new AttentionRun(2, [1, 64, 100, 45]).Bits, Is.EqualTo(whole.Bits));
        Assert.That(new AttentionRun(2, [33, 177]).Bits, Is.EqualTo(whole.Bits));
    }

    [Test]
    public void AllocatedBytes_AfterEverythingIsDisposed_IsZero()
    {
        CpuBackend backend = new(2);
        DeviceTensor x = Upload(backend, 1, 5, In);
        DeviceTensor y = backend.Allocate(5, Out);
        using (DeviceWeight weight = Weight(backend, DType.BF16))
        {
            backend.Logits(x, [0], weight, y.Slice(0, 1));
        }

        Assert.That(backend.AllocatedBytes, Is.GreaterThan(x.Bytes + y.Bytes), "the workspace counts");
        backend.Dispose();
        Assert.That(backend.AllocatedBytes, Is.EqualTo(x.Bytes + y.Bytes));
        x.Dispose();
        y.Dispose();
        y.Dispose();
        Assert.That(backend.AllocatedBytes, Is.Zero);
    }

    [Test]
    public void Operation_OnADisposedTensor_IsABrokenInvariant()
    {
        using CpuBackend backend = new(1);
        DeviceTensor x = backend.Allocate(1, 4);
        x.Dispose();
        Assert.That(() => backend.Add(x, x, x), Throws.TypeOf<System.Diagnostics.UnreachableException>());
    }

    [Test]
    public void Operations_SteadyState_AllocateNothing()
    {
        using CpuBackend backend = new(2);
        using DeviceWeight weight = Weight(backend, DType.BF16);
        using DeviceFactor a = backend.CreateFactor(5, In);
        using DeviceFactor b = backend.CreateFactor(5, Out);
        using DeviceTensor x = Upload(backend, 1, Rows, In);
        using DeviceTensor y = backend.Allocate(Rows, Out);
        int[] targets = [.. Enumerable.Range(0, Rows)];
        using DeviceTensor losses = backend.Allocate(Rows, 1);
        LoraSegment[] segments = [new(0, Rows, a, b, 0.5f)];
        long managed = 0;
        long native = 0;
        for (int round = 0; round < 3; round++)
        {
            // From the second round on nothing may grow.
            long before = GC.GetAllocatedBytesForCurrentThread();
            native = round == 1 ? backend.AllocatedBytes : native;
            backend.Linear(x, weight, null, y, accumulate: false);
            backend.LoraBypass(x, segments, y);
            backend.LinearBackwardInput(y, weight, x, accumulate: false);
            backend.FusedLinearCrossEntropy(x, targets, weight, 1f, x, losses);
            managed = GC.GetAllocatedBytesForCurrentThread() - before;
        }

        Assert.That(managed, Is.Zero);
        Assert.That(backend.AllocatedBytes, Is.EqualTo(native));
    }

    private static float[] Linear(int threads, int start, int count, DType type)
    {
        using CpuBackend backend = new(threads);
        using DeviceWeight weight = Weight(backend, type);
        using DeviceTensor x = Upload(backend, 1, Rows, In);
        using DeviceTensor bias = Upload(backend, 3, 1, Out);
        using DeviceTensor y = backend.Allocate(count, Out);
        backend.Linear(x.Slice(start, count), weight, bias, y, accumulate: false);
        return Download(backend, y);
    }

    private static float[] BackwardInput(int threads, int start, int count, DType type)
    {
        using CpuBackend backend = new(threads);
        using DeviceWeight weight = Weight(backend, type);
        using DeviceTensor dy = Upload(backend, 1, Rows, Out);
        using DeviceTensor dx = backend.Allocate(count, In);
        backend.LinearBackwardInput(dy.Slice(start, count), weight, dx, accumulate: false);
        return Download(backend, dx);
    }

    private static unsafe DeviceWeight Weight(CpuBackend backend, DType type)
    {
        fixed (float* w = Numbers(2, Out * In))
        {
            return backend.CreateWeight(new HostMatrix((byte*)w, DType.F32, Out, In), type);
        }
    }

    private static DeviceTensor Upload(CpuBackend backend, ulong seed, int rows, int columns)
    {
        DeviceTensor tensor = backend.Allocate(rows, columns);
        backend.Upload(Numbers(seed, rows * columns), tensor);
        return tensor;
    }

    private static float[] Download(CpuBackend backend, TensorSlice source)
    {
        float[] numbers = new float[source.Rows * source.Columns];
        backend.Download(source, numbers);
        return numbers;
    }

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

    private static int[] Bits(float[] numbers) => Array.ConvertAll(numbers, BitConverter.SingleToInt32Bits);

    /// <summary>One sequence of 210 positions: forward in the given windows, backward in the same windows from the end.</summary>
    private sealed class AttentionRun
    {
        private const int Positions = 210;
        private const int KvHeads = 2;
        private const int QueryHeads = 6;
        private const int HeadDim = 24;

        public AttentionRun(int threads, int[] windows)
        {
            using CpuBackend backend = new(threads);
            using DeviceKvCache cache = backend.CreateKvCache(1, 20, KvHeads, HeadDim);
            using DeviceTensor q = Upload(backend, 1, Positions, QueryHeads * HeadDim);
            using DeviceTensor k = Upload(backend, 2, Positions, KvHeads * HeadDim);
            using DeviceTensor v = Upload(backend, 3, Positions, KvHeads * HeadDim);
            using DeviceTensor dO = Upload(backend, 4, Positions, QueryHeads * HeadDim);
            using DeviceTensor o = backend.Allocate(Positions, QueryHeads * HeadDim);
            using DeviceTensor dQ = backend.Allocate(Positions, QueryHeads * HeadDim);
            using DeviceTensor dK = backend.Allocate(Positions, KvHeads * HeadDim);
            using DeviceTensor dV = backend.Allocate(Positions, KvHeads * HeadDim);
            using DeviceTensor lse = backend.Allocate(Positions, QueryHeads);
            int[] table = [.. Enumerable.Range(0, 14).Select(b => b * 7 % 20)];
            int start = 0;
            foreach (int length in windows)
            {
                AttentionSegment window = new(0, length, start, cache, table, lse);
                backend.AppendKv(k.Slice(start, length), v.Slice(start, length), 0, [window]);
                backend.Attention(q.Slice(start, length), o.Slice(start, length), 0, [window]);
                start += length;
            }

            foreach (int length in windows.Reverse())
            {
                start -= length;
                AttentionSegment window = new(0, length, start, cache, table, lse);
                backend.AttentionBackward(
                    q.Slice(start, length), dO.Slice(start, length), 0, window, dQ.Slice(start, length), dK, dV);
            }

            Bits = CpuBackendTests.Bits(
                [
                    .. Download(backend, o), .. Download(backend, lse), .. Download(backend, dQ), .. Download(backend, dK),
                    .. Download(backend, dV),
                ]);
        }

        public int[] Bits { get; }
    }
}
