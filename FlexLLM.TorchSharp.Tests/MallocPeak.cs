using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.RegularExpressions;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>
/// The most bytes that a call holds at once in large blocks of glibc's malloc, which is where libtorch's CPU tensors are, by malloc's own
/// high-water mark: however short the peak, and the same bytes in every run. The kernel's mark of the resident pages (VmHWM) is not:
/// it lacks what malloc serves from freed memory that has stayed resident, which depends on the tests before, and it holds pages of the
/// runtime's own, such as tables of the collector and code compiled meanwhile.
/// </summary>
internal static unsafe partial class MallocPeak
{
    // Blocks from here on are mapped one by one and counted. The JIT's arenas take slabs of half of that.
    private const int MappedMin = 1 << 17;
    private const int HeldMax = 1 << 16;
    private const int MapThreshold = -3; // M_MMAP_THRESHOLD
    private const int ErrorOutput = 2;

    /// <summary>Ignores the test where there is no such mark.</summary>
    public static void Prepare()
    {
        if (!OperatingSystem.IsLinux() || !NativeLibrary.TryLoad("libc.so.6", out nint library)
            || !NativeLibrary.TryGetExport(library, "mallinfo2", out _))
        {
            Assert.Ignore("The peak is read from malloc of glibc 2.33 or later.");
        }

        // By itself it would grow with the blocks that are freed.
        Assert.That(SetOption(MapThreshold, MappedMin), Is.EqualTo(1));
    }

    public static long Of(Action call)
    {
        call(); // What is made once is not the call's.
        GC.Collect();
        GC.WaitForPendingFinalizers();
        List<nint> held = [];
        try
        {
            FillHeap(held);
            // The mark never falls: what is held goes past it, so that the call's first block raises it.
            long before;
            do
            {
                held.Add(Allocate(Mark() - MappedBytes() + MappedMin));
                before = MappedBytes();
            }
            while (Mark() != before);
            call();
            return Mark() - before;
        }
        finally
        {
            held.ForEach(Free);
        }
    }

    /// <summary>Malloc maps a block only where no free memory of the thread's heap holds it: takes all of that.</summary>
    private static void FillHeap(List<nint> held)
    {
        long before = MappedBytes();
        while (MappedBytes() == before)
        {
            held.Add(Allocate(MappedMin));
            if (held.Count == HeldMax)
            {
                Assert.Fail("Malloc maps no block, so that its mark tells nothing.");
            }
        }
    }

    private static nint Allocate(long bytes)
    {
        nint block = AllocateBlock((nuint)bytes);
        Assert.That(block, Is.Not.Zero);
        return block;
    }

    private static long MappedBytes() => (long)Tell().MappedBytes;

    /// <summary>Glibc tells the mark in one place only: among the lines that it prints as errors are.</summary>
    private static long Mark()
    {
        string path = Path.GetTempFileName();
        int output = Duplicate(ErrorOutput);
        try
        {
            using (FileStream file = File.OpenWrite(path))
            {
                Assert.That(Replace((int)file.SafeFileHandle.DangerousGetHandle(), ErrorOutput), Is.EqualTo(ErrorOutput));
                PrintStatistics();
                Assert.That(Replace(output, ErrorOutput), Is.EqualTo(ErrorOutput));
            }

            return long.Parse(MarkLine().Match(File.ReadAllText(path)).Groups[1].ValueSpan, CultureInfo.InvariantCulture);
        }
        finally
        {
            Assert.That(Close(output), Is.Zero);
            File.Delete(path);
        }
    }

    [GeneratedRegex(@"max mmap bytes\s*=\s*(\d+)")]
    private static partial Regex MarkLine();

    [LibraryImport("libc.so.6", EntryPoint = "mallopt")]
    private static partial int SetOption(int option, int value);

    [LibraryImport("libc.so.6", EntryPoint = "malloc")]
    private static partial nint AllocateBlock(nuint bytes);

    [LibraryImport("libc.so.6", EntryPoint = "free")]
    private static partial void Free(nint block);

    [LibraryImport("libc.so.6", EntryPoint = "mallinfo2")]
    private static partial Told Tell();

    [LibraryImport("libc.so.6", EntryPoint = "malloc_stats")]
    private static partial void PrintStatistics();

    [LibraryImport("libc.so.6", EntryPoint = "dup")]
    private static partial int Duplicate(int file);

    [LibraryImport("libc.so.6", EntryPoint = "dup2")]
    private static partial int Replace(int file, int replaced);

    [LibraryImport("libc.so.6", EntryPoint = "close")]
    private static partial int Close(int file);

    /// <summary>Glibc's struct mallinfo2: ten sizes, of which the fifth is that of the mapped blocks.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private readonly struct Told
    {
        private readonly nuint _arena, _ordblks, _smblks, _hblks;
        public readonly nuint MappedBytes;
        private readonly nuint _usmblks, _fsmblks, _uordblks, _fordblks, _keepcost;
    }
}
