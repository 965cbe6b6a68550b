using FlexLLM.Backends;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>Tensors, weights, copies and what they cost.</summary>
internal static class MemoryChecks
{
    public static void Allocate(IComputeBackend backend, int rows, int columns)
    {
        using DeviceTensor tensor = backend.Allocate(rows, columns);
        float[] values = [.. Enumerable.Repeat(float.NaN, rows * columns)];
        backend.Download(tensor, values);
        Assert.That((tensor.Rows, tensor.Columns), Is.EqualTo((rows, columns)));
        Assert.That(values, Is.All.Zero);
    }

    /// <summary>Whatever is created adds its own Bytes to AllocatedBytes until it is disposed, and holds its elements.</summary>
    public static void Accounting(IComputeBackend backend)
    {
        Holds(() => backend.Allocate(7, 5), tensor => tensor.Bytes, 7 * 5 * 4);
        Holds(() => Weight(DType.F32), weight => weight.Bytes, 9 * 5 * 4);
        Holds(() => Weight(DType.BF16), weight => weight.Bytes, 9 * 5 * 2);
        Holds(() => backend.CreateFactor(3, 5), factor => factor.Bytes, 3 * 5 * 4);
        Holds(() => backend.CreateKvCache(2, 3, 2, 4), cache => cache.Bytes, 2L * 2 * 3 * DeviceKvCache.TokensPerBlock * 2 * 4);

        void Holds<T>(Func<T> create, Func<T, long> bytesOf, long least)
            where T : IDisposable
        {
            long before = backend.AllocatedBytes;
            using (T resource = create())
            {
                Assert.That(bytesOf(resource), Is.GreaterThanOrEqualTo(least), typeof(T).Name);
                Assert.That(backend.AllocatedBytes - before, Is.EqualTo(bytesOf(resource)), typeof(T).Name);
            }

            Assert.That(backend.AllocatedBytes, Is.EqualTo(before), typeof(T).Name);
        }

        unsafe DeviceWeight Weight(DType type)
        {
            float[] values = new float[9 * 5];
            fixed (float* data = values)
            {
                return backend.CreateWeight(new HostMatrix((byte*)data, DType.F32, 9, 5), type);
            }
        }
    }

    public static void Description(IComputeBackend backend)
    {
        using var bench = new Workbench(backend);
        (DeviceWeight weight, _) = bench.RandomWeight(9, 5, DType.BF16);
        DeviceFactor factor = bench.Own(backend.CreateFactor(3, 5));
        DeviceKvCache cache = bench.Own(backend.CreateKvCache(2, 3, 4, 6));
        Assert.That(backend.Name, Is.Not.Empty);
        Assert.That((weight.OutFeatures, weight.InFeatures, weight.Type), Is.EqualTo((9, 5, DType.BF16)));
        Assert.That((factor.Inner, factor.Wide), Is.EqualTo((3, 5)));
        Assert.That((factor.Values.Rows, factor.Values.Columns), Is.EqualTo((3, 5)));
        Assert.That((cache.Layers, cache.Blocks, cache.KvHeads, cache.HeadDim), Is.EqualTo((2, 3, 4, 6)));
        float[] values = [.. Enumerable.Repeat(1f, 3 * 5)];
        backend.Download(factor.Values, values);
        Assert.That(values, Is.All.Zero);
    }

    public static void Upload(IComputeBackend backend, int rows, int columns)
    {
        using var bench = new Workbench(backend);
        Matrix values = bench.Random(rows, columns);
        Operand target = bench.Output(rows, columns);
        backend.Upload(values.ToFloats(), target);
        Expect.SameBits("upload", target.Read(), values);
        bench.Verify();
    }

    public static void Copy(IComputeBackend backend, int rows, int columns)
    {
        using var bench = new Workbench(backend);
        Matrix values = bench.Random(rows, columns);
        Operand target = bench.Output(rows, columns);
        backend.Copy(bench.Source(values), target);
        Expect.SameBits("copy", target.Read(), values);
        bench.Verify();
    }

    public static void Zero(IComputeBackend backend, int rows, int columns)
    {
        using var bench = new Workbench(backend);
        Operand target = bench.Output(rows, columns);
        backend.Zero(target);
        Expect.SameBits("zero", target.Read(), new Matrix(rows, columns));
        bench.Verify();
    }

    public static void Gather(IComputeBackend backend, int count, int columns, DType type)
    {
        const int vocabulary = 19;
        using var bench = new Workbench(backend);
        (DeviceWeight table, Matrix values) = bench.RandomWeight(vocabulary, columns, type);
        int[] ids = [.. Enumerable.Range(0, count).Select(i => i == 0 ? vocabulary - 1 : bench.Chance.Next(vocabulary))];
        Operand y = bench.Output(count, columns);
        backend.Gather(table, ids, y);
        Expect.SameBits("gather", y.Read(), Reference.Gather(values, ids));
        bench.Verify();
    }

    /// <summary>Every pair of source and stored type, with ties and subnormals, exactly.</summary>
    public static void CreateWeight(IComputeBackend backend, DType sourceType, DType type)
    {
        using var bench = new Workbench(backend);
        Matrix source = bench.Random(5, 37, 3);
        (source[0, 0], source[0, 1], source[0, 2]) = (1 + (1.0 / 256), 1 + (3.0 / 256), 6e-6);
        (source[1, 0], source[1, 1], source[1, 2]) = (-1 - (1.0 / 256), 1e-40, -0.0);
        source = source.Rounded(sourceType);
        DeviceWeight weight = bench.Weight(source, type, sourceType);
        Operand y = bench.Output(5, 37);
        backend.Gather(weight, [0, 1, 2, 3, 4], y);
        Expect.SameBits("weight", y.Read(), source.Rounded(type));
        Assert.That((weight.OutFeatures, weight.InFeatures, weight.Type), Is.EqualTo((5, 37, type)));
    }
}
