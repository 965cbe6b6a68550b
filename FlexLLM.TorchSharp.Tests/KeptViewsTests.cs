using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Backends.Torch;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>Views are made once, stay valid for an operation, and are gone with their memory.</summary>
[TorchFixture]
internal sealed class KeptViewsTests
{
    private TorchComputeBackend _backend = null!;
    private DeviceTensor _tensor = null!;

    [SetUp]
    public void SetUp()
    {
        _backend = new TorchComputeBackend(new torch.Device(DeviceType.CPU));
        _tensor = _backend.Allocate(200, 16);
    }

    [TearDown]
    public void TearDown()
    {
        _tensor.Dispose();
        _backend.Dispose();
    }

    [Test]
    public void Of_SameRowsAgain_IsTheSameTensor()
    {
        torch.Tensor first = TorchContext.Of(_tensor.Slice(3, 2));
        Assert.That(TorchContext.Of(_tensor.Slice(3, 2)), Is.SameAs(first));
        Assert.That(TorchContext.Of(_backend.View(_tensor, 48, 2, 16)), Is.SameAs(first), "The same elements by another name.");
        Assert.That(TorchContext.Of(_tensor.Slice(3, 2), ViewShape.Cube(2, 2, 8, 16, 8)), Is.Not.SameAs(first), "Control.");
    }

    [Test]
    public void Of_MoreThanAreKept_AreBoundedAndRightAndLastAGeneration()
    {
        _backend.Upload([.. Enumerable.Range(0, 3200).Select(i => (float)i)], _tensor);
        long before = torch.Tensor.TotalCount;
        torch.Tensor held = TorchContext.Of(_tensor.Slice(0, 2));
        for (int i = 1; i <= KeptViews.GenerationSize; i++)
        {
            TorchContext.Of(_tensor.Slice(i, 2));
        }

        Assert.That(held.dtype, Is.EqualTo(torch.ScalarType.Float32), "Not disposed.");
        for (int round = 0; round < 3; round++)
        {
            for (int i = 0; i < 198; i++)
            {
                float value = System.Runtime.InteropServices.MemoryMarshal.Cast<byte, float>(
                    TorchContext.Of(_tensor.Slice(i, 2)).bytes)[0];
                Assert.That(value, Is.EqualTo(16f * i));
            }
        }

        Assert.That(torch.Tensor.TotalCount - before, Is.InRange(KeptViews.GenerationSize, 2 * KeptViews.GenerationSize));
        _tensor.Dispose();
        Assert.That(torch.Tensor.TotalCount, Is.EqualTo(before - 2), "Nothing keeps the memory: neither views nor the tensor itself.");
        Assert.That(() => TorchContext.Of(_tensor.Slice(3, 2)), Throws.TypeOf<UnreachableException>());
    }

    // A step has angles of its positions for queries and keys of every layer; a table that changes has others.
    [Test]
    public void Rope_SamePositionsAndAnotherTable_AreNotTheOldAngles([Values] bool inverse)
    {
        using DeviceTensor table = _backend.Allocate(4, 8);
        float[] first = Rotated(table, 1f, inverse);
        Assert.That(Rotated(table, 1f, inverse), Is.EqualTo(first));
        Assert.That(Rotated(table, 0.5f, inverse), Is.Not.EqualTo(first));
        Assert.That(Rotated(table, 1f, !inverse), Is.Not.EqualTo(first));
    }

    private float[] Rotated(DeviceTensor table, float factor, bool inverse)
    {
        _backend.Upload([.. Enumerable.Range(1, 32).Select(i => factor * i)], table);
        _backend.Upload([.. Enumerable.Range(1, 32).Select(i => (float)i)], _tensor.Slice(0, 2));
        _backend.Rope(_tensor.Slice(0, 2), [1, 3], table, inverse);
        float[] values = new float[32];
        _backend.Download(_tensor.Slice(0, 2), values);
        return values;
    }
}
