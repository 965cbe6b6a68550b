using System.Runtime.InteropServices;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>The peak that is read is that of the call.</summary>
[TestFixture]
[NonParallelizable]
internal sealed unsafe class MallocPeakTests
{
    private const int Mebibyte = 1 << 20;

    [SetUp]
    public void SetUp() => MallocPeak.Prepare();

    [Test]
    public void Of_BlocksFreedBeforeTheEnd_IsTheMostHeldAtOnce()
    {
        long peak = MallocPeak.Of(() =>
        {
            Hold(20);
            Hold(8, 4);
            Hold(6);
            Hold(1, 2, 3);
        });
        Assert.That(peak, Is.InRange(20L * Mebibyte, (20L * Mebibyte) + Environment.SystemPageSize));
        peak = MallocPeak.Of(() => Hold(8, 4));
        Assert.That(peak, Is.InRange(12L * Mebibyte, (12L * Mebibyte) + (2 * Environment.SystemPageSize)), "A higher mark is forgotten.");
        Assert.That(MallocPeak.Of(() => { }), Is.Zero);
    }

    [Test]
    public void Of_FreeMemoryInTheHeap_IsTheSame()
    {
        // Blocks too small to be mapped lie side by side, and become one free range before the last.
        nint[] blocks = [.. Enumerable.Range(0, 256).Select(_ => (nint)NativeMemory.Alloc(1 << 16))];
        Array.ForEach(blocks[..^1], block => NativeMemory.Free((void*)block));
        long peak = MallocPeak.Of(() => Hold(8));
        NativeMemory.Free((void*)blocks[^1]);
        Assert.That(peak, Is.InRange(8L * Mebibyte, (8L * Mebibyte) + Environment.SystemPageSize));
    }

    private static void Hold(params int[] mebibytes)
    {
        nint[] blocks = [.. mebibytes.Select(size => (nint)NativeMemory.Alloc((nuint)(size * Mebibyte)))];
        Array.ForEach(blocks, block => NativeMemory.Free((void*)block));
    }
}
