using System.Runtime.InteropServices;
using FlexLLM.Backends.Torch;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>Memory that indices leave from is not written again before the device has them.</summary>
[TorchFixture]
internal sealed class IndexStagingTests
{
    private const int Capacity = 10;

    [Test]
    public void Copy_ManyLists_WaitsOnlyWhereTheNextDoesNotFit()
    {
        int waits = 0;
        using (var buffer = new IndexStaging(new torch.Device(DeviceType.CPU), Capacity, () => waits++))
        {
            int[] lengths = [4, 6, 1, 9, 10, 3];
            int[] waited = [.. lengths.Select(length =>
            {
                Check(buffer, length);
                return waits;
            })];
            Assert.That(waited, Is.EqualTo(new[] { 0, 0, 1, 1, 2, 3 }));
            buffer.Arrived();
            Check(buffer, Capacity);
            Assert.That(waits, Is.EqualTo(3), "Somebody has waited already.");
        }

        Assert.That(waits, Is.EqualTo(4), "Nothing is freed under a copy.");
    }

    [Test]
    public void Copy_ListLongerThanTheBuffer_IsCopiedFromItsOwnMemory()
    {
        using var buffer = new IndexStaging(new torch.Device(DeviceType.CPU), Capacity, () => { });
        Check(buffer, 3);
        Check(buffer, Capacity + 1);
        Check(buffer, 0);
    }

    [Test]
    public void Copy_LaterLists_LeaveEarlierCopiesAsTheyWere()
    {
        using var buffer = new IndexStaging(new torch.Device(DeviceType.CPU), Capacity, () => { });
        using DisposeScope scope = torch.NewDisposeScope();
        torch.Tensor first = buffer.Copy([1, 2, 3]);
        buffer.Arrived();
        buffer.Copy([7, 8, 9]);
        Assert.That(NumbersOf(first), Is.EqualTo(new long[] { 1, 2, 3 }));
    }

    [Test]
    public void Pin_OfTheBuffer_EndsBeforeItsMemory()
    {
        var events = new List<string>();
        using (new IndexStaging(new torch.Device(DeviceType.CPU), Capacity, () => events.Add("wait"), (address, bytes) =>
        {
            Assert.That(address, Is.Not.Zero);
            events.Add($"pin {bytes}");
            return new Unpinning(events);
        }))
        {
            events.Add("used");
        }

        Assert.That(events, Is.EqualTo(new[] { "pin 80", "used", "wait", "unpin" }));
    }

    [Test]
    public void Dispose_DeviceThatIsLost_FreesAllTheSame()
    {
        long before = torch.Tensor.TotalCount;

        // What libtorch's errors are, made as the runtime makes it.
        var buffer = new IndexStaging(
            new torch.Device(DeviceType.CPU), Capacity, () => Marshal.ThrowExceptionForHR(unchecked((int)0x80004005)));
        buffer.Dispose();
        Assert.That(torch.Tensor.TotalCount, Is.LessThanOrEqualTo(before));
    }

    private static void Check(IndexStaging buffer, int length)
    {
        using DisposeScope scope = torch.NewDisposeScope();
        long[] values = [.. Enumerable.Range(length, length).Select(i => (long)i)];
        Assert.That(NumbersOf(buffer.Copy(values)), Is.EqualTo(values));
    }

    private static long[] NumbersOf(torch.Tensor tensor) => MemoryMarshal.Cast<byte, long>(tensor.bytes).ToArray();

    private sealed class Unpinning(List<string> events) : IDisposable
    {
        public void Dispose() => events.Add("unpin");
    }
}
