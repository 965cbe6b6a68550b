using System.Diagnostics;
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

    /// <summary>Bytes that the backend tells beforehand are those that the resource holds.</summary>
    public static void ToldBytes(IComputeBackend backend, int rows, int columns)
    {
        foreach (TensorUse use in Enum.GetValues<TensorUse>())
        {
            using DeviceTensor tensor = backend.Allocate(rows, columns, use);
            Assert.That(tensor.Bytes, Is.EqualTo(backend.TensorBytes(rows, columns, use)));
        }

        using var bench = new Workbench(backend);
        foreach (DType type in new[] { DType.F32, DType.BF16 })
        {
            (DeviceWeight weight, _) = bench.RandomWeight(columns, rows + 1, type);
            Assert.That(weight.Bytes, Is.EqualTo(backend.WeightBytes(columns, rows + 1, type)));
        }

        DeviceFactor factor = bench.Own(backend.CreateFactor(rows + 1, columns));
        Assert.That(factor.Bytes, Is.EqualTo(backend.FactorBytes(rows + 1, columns)));
        DeviceKvCache cache = bench.Own(backend.CreateKvCache(3, rows, 2, 2 * columns));
        Assert.That(cache.Bytes, Is.EqualTo(backend.KvCacheBytes(3, rows, 2, 2 * columns)));
    }

    /// <summary>
    /// Keys and values of the blocks that stay are seen by attention as before, bytes are those of a cache made so large, and
    /// blocks that came serve like any.
    /// </summary>
    public static void Resize(IComputeBackend backend, int blocks, params int[] sizes)
    {
        HeadShape shape = new(KvHeads: 2, Group: 3, HeadDim: 6);
        using var bench = new Workbench(backend);
        DeviceKvCache cache = bench.Own(backend.CreateKvCache(2, blocks, shape.KvHeads, shape.HeadDim));
        int kept = sizes.Append(blocks).Min();
        foreach (int layer in new[] { 0, 1 })
        {
            Append(kept, layer, seed: 20 + layer);
        }

        foreach (int size in sizes)
        {
            long others = backend.AllocatedBytes - cache.Bytes;
            backend.ResizeKvCache(cache, size);
            Assert.That(cache.Blocks, Is.EqualTo(size));
            Assert.That(cache.Bytes, Is.EqualTo(backend.KvCacheBytes(2, size, shape.KvHeads, shape.HeadDim)));
            Assert.That(backend.AllocatedBytes, Is.EqualTo(others + cache.Bytes));
            foreach (int layer in new[] { 0, 1 })
            {
                Attend(kept, layer, Random(kept, 20 + layer).Rounded(cache.Type));
                Append(size, layer, seed: 30);
                Attend(size, layer, Random(size, 30).Rounded(cache.Type));
                Append(kept, layer, seed: 20 + layer);
            }
        }

        Matrix Random(int count, int seed)
        {
            var random = new SeededRandom((ulong)seed);
            return Matrix.Random(ref random, count * DeviceKvCache.TokensPerBlock, shape.KvColumns, 1);
        }

        void Append(int count, int layer, int seed)
        {
            using var own = new Workbench(backend);
            Operand rows = own.Source(Random(count, seed));
            backend.AppendKv(rows, rows, layer, [Segment(count) with { RowCount = rows.All.Rows }]);
        }

        void Attend(int count, int layer, Matrix keys)
        {
            using var own = new Workbench(backend);
            Matrix q = own.Random(1, shape.QueryColumns);
            Operand o = own.Output(1, shape.QueryColumns);
            int last = keys.Rows - 1;
            backend.Attention(own.Source(q), o, layer, [Segment(count) with { PositionStart = last, RowCount = 1 }]);
            Matrix expected = Reference.Attention(q, keys, keys, last, shape).O;
            Expect.Close("attention", o.Read(), expected, expected.Map(_ => 10), 100);
        }

        AttentionSegment Segment(int count) => new(0, 0, 0, cache, [.. Enumerable.Range(0, count)]);
    }

    /// <summary>Extents come and go whole.</summary>
    public static void ResizeWithinAnExtent(IComputeBackend backend)
    {
        using var bench = new Workbench(backend);
        DeviceKvCache cache = bench.Own(backend.CreateKvCache(1, 20, 1, 4));
        Assert.Throws<UnreachableException>(() => backend.ResizeKvCache(cache, 17));
        Assert.Throws<UnreachableException>(() => backend.ResizeKvCache(cache, 32));
        Assert.Throws<UnreachableException>(() => backend.ResizeKvCache(cache, -16));
        backend.ResizeKvCache(cache, 20);
        backend.ResizeKvCache(cache, 0);
        Assert.That(cache.Bytes, Is.Zero);
    }

    /// <summary>Each use has its type and bytes; a view has its owner's, and counts in elements.</summary>
    public static void Types(IComputeBackend backend, DType activations, int devices)
    {
        foreach ((TensorUse use, DType type) in new[] { (TensorUse.Exact, DType.F32), (TensorUse.Activation, activations) })
        {
            using DeviceTensor owner = backend.Allocate(4, 16, use);
            DeviceTensor view = backend.View(backend.View(owner, 16, 3, 16), 16, 1, 8);
            backend.Upload([.. Enumerable.Range(0, 64).Select(i => (float)i)], owner);
            float[] values = new float[8];
            backend.Download(view, values);
            Assert.That((owner.Type, view.Type, view.Bytes), Is.EqualTo((type, type, 0L)));
            Assert.That(owner.Bytes, Is.EqualTo(devices * 64 * DTypes.BytesOf(type)));
            Assert.That(values, Is.EqualTo(Enumerable.Range(32, 8)));
        }
    }

    public static void Description(IComputeBackend backend, DType kvType)
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
        Assert.That(cache.Type, Is.EqualTo(kvType));
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
