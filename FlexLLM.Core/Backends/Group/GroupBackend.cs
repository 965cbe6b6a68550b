using System.Runtime.ExceptionServices;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Group;

/// <summary>
/// Devices that compute one step together: a device made of devices. Every tensor has a part of one shape on each rank, and an operation
/// is that operation on each rank's parts. What differs between ranks (which slice of a weight they hold, what they tell each other)
/// is said with <see cref="Note"/> and <see cref="Settle"/>.
/// </summary>
/// <remarks>
/// Operations are noted when they are called, and done when somebody reads a result, frees memory or waits: then all ranks do what was
/// noted, in order, at the same time, a thread each. So whoever interprets a program does it once, ranks meet in their collectives
/// alone, and a fault of an operation is thrown by the call that waits for it. Of what was noted behind that operation other ranks may have
/// done some, and nobody does the rest. What the group holds and tells in bytes is that of all ranks together.
/// </remarks>
internal sealed partial class GroupBackend : IComputeBackend
{
    private readonly IComputeBackend[] _devices;
    private readonly InProcessGroup _group;
    private readonly GroupRank[] _ranks;
    private readonly List<Action<GroupRank>> _noted = [];
    private Exception? _fault;

    /// <summary>A rank for each device. They become the group's, which disposes them.</summary>
    public GroupBackend(IReadOnlyList<IComputeBackend> devices)
    {
        ArgumentOutOfRangeException.ThrowIfZero(devices.Count);
        _devices = [.. devices];
        _group = new InProcessGroup(_devices);
        _ranks = [.. _devices.Select((device, rank) => new GroupRank(rank, Ranks, device, _group[rank]))];
    }

    public string Name => $"group of {string.Join(", ", _devices.Select(d => d.Name))}";

    public int Ranks => _devices.Length;

    public long AllocatedBytes => _devices.Sum(d => d.AllocatedBytes);

    // What the fullest has free, on each: parts are equal.
    public long? MemoryBytes => _devices.All(d => d.MemoryBytes is not null) ? _devices.Min(d => d.MemoryBytes!.Value) * Ranks : null;

    /// <summary>Adds work that is done on each rank, each on its own thread, behind what was noted before.</summary>
    public void Note(Action<GroupRank> work) => _noted.Add(work);

    /// <summary>
    /// Does what was noted. The caller may then call the devices itself, one after the other, until it calls the group again.
    /// </summary>
    public IReadOnlyList<GroupRank> Settle()
    {
        Finish();
        return _ranks;
    }

    public void Synchronize()
    {
        Note(rank => rank.Device.Synchronize());
        Finish();
    }

    public bool IsOutOfMemory(Exception fault) => _devices.Any(d => d.IsOutOfMemory(fault));

    public long TensorBytes(int rows, int columns, TensorUse use = TensorUse.Exact) =>
        _devices.Sum(d => d.TensorBytes(rows, columns, use));

    public long WeightBytes(int outFeatures, int inFeatures, DType type) =>
        _devices.Sum(d => d.WeightBytes(outFeatures, inFeatures, type));

    public long FactorBytes(int inner, int wide) => _devices.Sum(d => d.FactorBytes(inner, wide));

    public long KvCacheBytes(int layers, int blocks, int kvHeads, int headDim) =>
        _devices.Sum(d => d.KvCacheBytes(layers, blocks, kvHeads, headDim));

    public long ScratchBytes(in ScratchLimits limits)
    {
        long bytes = _group.IsDirect ? TensorBytes(1, RoomFor(limits)) : 0;
        foreach (IComputeBackend device in _devices)
        {
            bytes += device.ScratchBytes(limits);
        }

        return bytes;
    }

    public void ReserveScratch(in ScratchLimits limits)
    {
        Finish();
        foreach (IComputeBackend device in _devices)
        {
            device.ReserveScratch(limits);
        }

        _group.ReserveRoom(RoomFor(limits));
    }

    public DeviceTensor Allocate(int rows, int columns, TensorUse use = TensorUse.Exact) =>
        new GroupTensor(this, OnEach(rank => rank.Device.Allocate(rows, columns, use)));

    public DeviceTensor View(DeviceTensor owner, long offset, int rows, int columns) =>
        new GroupTensor(this, OnEach(rank => rank.Device.View(rank.Of(owner), offset, rows, columns)));

    public DeviceWeight CreateWeight(in HostMatrix source, DType type)
    {
        HostMatrix whole = source;
        return CreateWeight(rank => rank.Device.CreateWeight(whole, type));
    }

    /// <summary>A weight whose parts are made one by one: slices of a whole, all of one shape.</summary>
    public DeviceWeight CreateWeight(Func<GroupRank, DeviceWeight> partOf) => new GroupWeight(this, OnEach(partOf));

    public DeviceKvCache CreateKvCache(int layers, int blocks, int kvHeads, int headDim) =>
        new GroupKvCache(this, OnEach(rank => rank.Device.CreateKvCache(layers, blocks, kvHeads, headDim)));

    public void ResizeKvCache(DeviceKvCache cache, int blocks) => ((GroupKvCache)cache).Resize(blocks);

    public DeviceFactor CreateFactor(int inner, int wide) =>
        new GroupFactor(this, OnEach(rank => rank.Device.CreateFactor(inner, wide)));

    public void Upload(ReadOnlySpan<float> source, TensorSlice destination)
    {
        foreach (GroupRank rank in Settle())
        {
            rank.Device.Upload(source, rank.Of(destination));
        }
    }

    /// <summary>What rank 0 has of it.</summary>
    public void Download(TensorSlice source, Span<float> destination)
    {
        GroupRank first = Settle()[0];
        first.Device.Download(first.Of(source), destination);
    }

    /// <summary>Frees parts. What was noted may still need them, and what it fails of is told to whoever waits next.</summary>
    public void Free(IEnumerable<IDisposable> parts)
    {
        try
        {
            Finish();
        }
#pragma warning disable CA1031 // Who frees may be leaving a call that failed, and must get to its end.
        catch (Exception e)
#pragma warning restore CA1031
        {
            _fault = e;
        }

        foreach (IDisposable part in parts)
        {
            part.Dispose();
        }
    }

    public void Dispose()
    {
        _noted.Clear();
        _group.Dispose();
        foreach (IComputeBackend device in _devices)
        {
            device.Dispose();
        }
    }

    // An all-reduce sums a rank's share of the elements there: of rows of a batch, or in training of a partial gradient, at most as wide as
    // all ranks' inputs together.
    private static int RoomFor(in ScratchLimits limits) => checked(
        (limits.Trains ? Math.Max(limits.Rows, limits.InnerMax) : limits.Rows) * Math.Max(limits.InputColumnsMax, limits.HiddenColumns));

    private void Finish()
    {
        if (_fault is Exception earlier)
        {
            _fault = null;
            _noted.Clear();
            ExceptionDispatchInfo.Throw(earlier);
        }

        if (_noted.Count == 0)
        {
            return;
        }

        try
        {
            _group.Run(communicator =>
            {
                foreach (Action<GroupRank> work in _noted)
                {
                    work(_ranks[communicator.Rank]);
                }
            });
        }
        catch
        {
            _group.Recover();
            throw;
        }
        finally
        {
            _noted.Clear();
        }
    }

    // Memory is made at once: what was noted cannot know of it.
    private T[] OnEach<T>(Func<GroupRank, T> create)
        where T : IDisposable
    {
        var made = new ResourceSet();
        try
        {
            return [.. _ranks.Select(rank => made.Add(create(rank)))];
        }
        catch
        {
            made.Dispose();
            throw;
        }
    }
}
