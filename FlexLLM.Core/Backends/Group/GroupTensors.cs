using FlexLLM.Primitives;

namespace FlexLLM.Backends.Group;

/// <summary>A tensor with a part of one shape on each rank.</summary>
internal sealed class GroupTensor(GroupBackend group, IReadOnlyList<DeviceTensor> parts) : DeviceTensor(parts[0].Rows, parts[0].Columns)
{
    public IReadOnlyList<DeviceTensor> Parts => parts;

    public override DType Type => parts[0].Type;

    public override long Bytes => parts.Sum(part => part.Bytes);

    public override void Dispose() => group.Free(parts);
}

/// <summary>A weight with a part of one shape on each rank.</summary>
internal sealed class GroupWeight(GroupBackend group, IReadOnlyList<DeviceWeight> parts)
    : DeviceWeight(parts[0].OutFeatures, parts[0].InFeatures, parts[0].Type)
{
    public IReadOnlyList<DeviceWeight> Parts => parts;

    public override long Bytes => parts.Sum(part => part.Bytes);

    public override void Dispose() => group.Free(parts);
}

/// <summary>A bypass matrix with a part of one shape on each rank.</summary>
internal sealed class GroupFactor(GroupBackend group, IReadOnlyList<DeviceFactor> parts) : DeviceFactor(parts[0].Inner, parts[0].Wide)
{
    public IReadOnlyList<DeviceFactor> Parts => parts;

    // The parts free them: this one is only read and written through.
    public override DeviceTensor Values { get; } = new GroupTensor(group, [.. parts.Select(part => part.Values)]);

    public override long Bytes => parts.Sum(part => part.Bytes);

    public override void Dispose() => group.Free(parts);
}

/// <summary>A KV cache with the same blocks on each rank, which hold its rank's heads.</summary>
internal sealed class GroupKvCache(GroupBackend group, IReadOnlyList<DeviceKvCache> parts)
    : DeviceKvCache(parts[0].Layers, parts[0].Blocks, parts[0].KvHeads, parts[0].HeadDim)
{
    public IReadOnlyList<DeviceKvCache> Parts => parts;

    public override DType Type => parts[0].Type;

    public override long Bytes => parts.Sum(part => part.Bytes);

    public override void Dispose() => group.Free(parts);

    /// <summary>Resizes every part. Where memory runs out on one, those before it get the size back that they had.</summary>
    public void Resize(int blocks)
    {
        CheckResize(blocks);
        IReadOnlyList<GroupRank> ranks = group.Settle();
        int done = 0;
        try
        {
            for (; done < ranks.Count; done++)
            {
                ranks[done].Device.ResizeKvCache(parts[done], blocks);
            }
        }
        catch
        {
            while (--done >= 0)
            {
                ranks[done].Device.ResizeKvCache(parts[done], Blocks);
            }

            throw;
        }

        Blocks = blocks;
    }
}

/// <summary>One rank as work on a <see cref="GroupBackend"/> sees it: its device, and its parts of what the group has.</summary>
internal readonly record struct GroupRank(int Index, int Count, IComputeBackend Device, Communicator Communicator)
{
    public TensorSlice Of(TensorSlice slice)
    {
        int rows = slice.IsRowSplit ? Shard.Of(slice.Rows, Index, Count).Count : slice.Rows;
        return new TensorSlice(Of(slice.Tensor), slice.Start, rows);
    }

    public TensorSlice? Of(TensorSlice? slice) => slice is TensorSlice some ? Of(some) : null;

    public DeviceTensor Of(DeviceTensor tensor) => ((GroupTensor)tensor).Parts[Index];

    public DeviceTensor? OfAny(DeviceTensor? tensor) => tensor is null ? null : Of(tensor);

    public DeviceWeight Of(DeviceWeight weight) => ((GroupWeight)weight).Parts[Index];

    public DeviceFactor Of(DeviceFactor factor) => ((GroupFactor)factor).Parts[Index];

    public DeviceKvCache Of(DeviceKvCache cache) => ((GroupKvCache)cache).Parts[Index];

    public LoraSegment Of(LoraSegment segment) => segment with { A = Of(segment.A), BTransposed = Of(segment.BTransposed) };

    public AttentionSegment Of(AttentionSegment segment) =>
        segment with { Cache = Of(segment.Cache), LogSumExp = OfAny(segment.LogSumExp) };
}
