using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Backends.Group;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends.Group;

/// <summary>What a group notes, when it does it, and what becomes of faults.</summary>
[TestFixture]
internal sealed class GroupBackendTests
{
    private readonly List<string> _called = [];
    private string? _fails;
    private GroupBackend _group = null!;
    private DeviceTensor _tensor = null!;

    [SetUp]
    public void SetUp()
    {
        _fails = null;
        _group = new GroupBackend([new CpuBackend(1), new ProbedBackend(new CpuBackend(1), Called)]);
        _tensor = _group.Allocate(4, 6);
        _called.Clear();
    }

    [TearDown]
    public void TearDown()
    {
        _tensor.Dispose();
        _group.Dispose();
    }

    [Test]
    public void Operations_Noted_AreDoneInOrderWhenSomebodyReads()
    {
        Fill(3);
        _called.Clear();
        _group.Copy(_tensor.Slice(0, 1), _tensor.Slice(3, 1));
        _group.Zero(_tensor.Slice(0, 3));
        Assert.That(_called, Is.Empty);
        Assert.That(Read(), Is.EqualTo(Enumerable.Repeat(0f, 18).Concat(Enumerable.Repeat(3f, 6))));
        Assert.That(_called, Is.EqualTo(new[] { "Copy", "Zero" }), "what is read is rank 0's");
    }

    [Test]
    public void Slice_SplitByRows_IsEachRanksShare()
    {
        Fill(1);
        _group.Zero(new TensorSlice(_tensor, 0, 3) with { IsRowSplit = true });
        Assert.That(PartsOf().Select(part => part.Count(v => v == 0)), Is.EqualTo(new[] { 6, 12 }), "1 row of 3, and 2");
    }

    [Test]
    public void Fault_OfOneRank_IsThrownOnceByWhoWaitsAndTheGroupGoesOn()
    {
        _group.Note(rank => rank.Communicator.AllReduce(rank.Of(_tensor)));
        _group.Synchronize();
        long held = _group.AllocatedBytes;
        _fails = "Copy";
        _group.Copy(_tensor.Slice(0, 1), _tensor.Slice(1, 1));
        _group.Note(rank => rank.Communicator.AllReduce(rank.Of(_tensor)));
        Assert.That(_group.Synchronize, Throws.InstanceOf<InsufficientMemoryException>());
        Assert.That(_group.AllocatedBytes, Is.EqualTo(held), "the room of all-reduces stays");
        Assert.That(_group.IsOutOfMemory(new InsufficientMemoryException()), Is.True);
        _fails = null;
        Fill(2);
        _group.Note(rank => rank.Communicator.AllReduce(rank.Of(_tensor)));
        Assert.That(PartsOf(), Has.All.All.EqualTo(4f));
    }

    [Test]
    public void Fault_FoundByWhoFrees_IsToldToWhoWaitsNext()
    {
        DeviceTensor other = _group.Allocate(1, 6);
        long held = _group.AllocatedBytes;
        _fails = "Zero";
        _group.Zero(other);
        Assert.That(other.Dispose, Throws.Nothing);
        Assert.That(_group.AllocatedBytes, Is.LessThan(held));
        _fails = null;
        Assert.That(_group.Synchronize, Throws.InstanceOf<InsufficientMemoryException>());
        Assert.That(_group.Synchronize, Throws.Nothing);
    }

    [Test]
    public void Operations_NotedBehindAFaultThatNobodyWaitedFor_AreNotDoneOnFreedMemory()
    {
        DeviceTensor first = _group.Allocate(1, 6);
        DeviceTensor second = _group.Allocate(1, 6);
        _fails = "Copy";
        _group.Copy(first, _tensor.Slice(0, 1));
        first.Dispose();
        _fails = null;
        _group.Zero(second);
        second.Dispose();
        _called.Clear();
        Assert.That(_group.Synchronize, Throws.InstanceOf<InsufficientMemoryException>());
        Assert.That(_group.Synchronize, Throws.Nothing);
        Assert.That(_called, Does.Not.Contain("Zero"));
    }

    [Test]
    public void Creation_ThatFailsOnOneRank_LeavesNothing([Values("Allocate", "CreateFactor", "CreateKvCache")] string operation)
    {
        long held = _group.AllocatedBytes;
        _fails = operation;
        Assert.That(Create, Throws.InstanceOf<InsufficientMemoryException>());
        Assert.That(_group.AllocatedBytes, Is.EqualTo(held));

        IDisposable Create() => operation switch
        {
            "Allocate" => _group.Allocate(2, 2),
            "CreateFactor" => _group.CreateFactor(2, 2),
            _ => _group.CreateKvCache(1, 16, 1, 8),
        };
    }

    [Test]
    public void ResizeKvCache_ThatFailsOnOneRank_LeavesTheCacheAsItWas()
    {
        using DeviceKvCache cache = _group.CreateKvCache(1, 32, 1, 8);
        (int blocks, long bytes) = (cache.Blocks, cache.Bytes);
        _fails = "ResizeKvCache";
        Assert.That(() => _group.ResizeKvCache(cache, 48), Throws.InstanceOf<InsufficientMemoryException>());
        Assert.That((cache.Blocks, cache.Bytes), Is.EqualTo((blocks, bytes)));
        _fails = null;
        _group.ResizeKvCache(cache, 16);
        Assert.That(cache.Bytes, Is.EqualTo(_group.KvCacheBytes(1, 16, 1, 8)));
    }

    [Test]
    public void MemoryBytes_OfDevicesWithMemory_AreAsManyTimesTheFullestHas()
    {
        using var group = new GroupBackend([new Sized(900), new Sized(700)]);
        Assert.That(group.MemoryBytes, Is.EqualTo(1400));
        using var mixed = new GroupBackend([new Sized(900), new CpuBackend(1)]);
        Assert.That(mixed.MemoryBytes, Is.Null);
    }

    private void Called(string operation)
    {
        _called.Add(operation);
        if (operation == _fails)
        {
            throw new InsufficientMemoryException("No more.");
        }
    }

    private void Fill(float value) => _group.Upload([.. Enumerable.Repeat(value, 24)], _tensor);

    private float[] Read()
    {
        float[] values = new float[24];
        _group.Download(_tensor, values);
        return values;
    }

    private float[][] PartsOf() => [.. _group.Settle().Select(rank =>
    {
        float[] values = new float[24];
        rank.Device.Download(rank.Of(_tensor), values);
        return values;
    })];

    private sealed class Sized(long bytes) : Contracts.DelegatingBackend(new CpuBackend(1))
    {
        public override long? MemoryBytes => bytes;
    }
}
