namespace FlexLLM.Backends.Group;

/// <summary>
/// How one rank of an <see cref="InProcessGroup"/> shows values to the others and reads theirs; the group says what, and when. Places are
/// counted in elements from the first of a slice: the shape of a slice does not matter. One thread at a time, and the same for all ports
/// of a group: they read each other's memory.
/// </summary>
internal abstract class RankPort : IDisposable
{
    /// <summary>
    /// A port for each backend: onto its own memory where all of them read each other's (<see cref="IComputeBackend.PeerKind"/>), else
    /// onto memory of the host.
    /// </summary>
    public static RankPort[] Of(IReadOnlyList<IComputeBackend> backends)
    {
        string? kind = backends[0].PeerKind;
        bool isDirect = kind is not null && backends.All(backend => backend.PeerKind == kind);
        return [.. backends.Select(Create)];

        RankPort Create(IComputeBackend backend) => isDirect ? new DevicePort(backend) : new HostPort(backend);
    }

    /// <summary>A tensor's values where others can read them, until this rank posts again or writes to the tensor.</summary>
    public abstract TensorSlice Post(TensorSlice source);

    /// <summary>Memory for at least so many elements that others can read, until the rank asks again.</summary>
    public abstract TensorSlice Room(int count);

    /// <summary>Makes that memory so large, and no larger.</summary>
    public abstract void Reserve(int count);

    /// <summary>Where to put what <see cref="Deliver"/> brings to a tensor of this rank.</summary>
    public abstract TensorSlice Target(TensorSlice destination);

    /// <summary>destination (+)= source: the source is any port's, the destination this one's. Not empty.</summary>
    public abstract void Read(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate);

    /// <summary>All elements of its target have been read.</summary>
    public abstract void Deliver(TensorSlice destination);

    /// <summary>Frees the room. The port may not be used any more.</summary>
    public abstract void Dispose();
}

/// <summary>What is posted stays where it is; the backend reads it there.</summary>
internal sealed class DevicePort(IComputeBackend backend) : RankPort
{
    private DeviceTensor? _room;

    public override TensorSlice Post(TensorSlice source) => source;

    public override TensorSlice Room(int count)
    {
        if (_room is null || _room.Columns < count)
        {
            Reserve(count);
        }

        return _room!;
    }

    public override void Reserve(int count)
    {
        if (_room?.Columns != count)
        {
            _room?.Dispose();
            _room = null;
            _room = backend.Allocate(1, count);
        }
    }

    public override TensorSlice Target(TensorSlice destination) => destination;

    public override void Read(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate) =>
        backend.ReadPeer(source, from, destination, to, accumulate);

    public override void Deliver(TensorSlice destination)
    {
        // It was read there.
    }

    public override void Dispose() => _room?.Dispose();
}

/// <summary>What is posted is copied to the host, summed there and copied to the device of whoever takes it.</summary>
internal sealed class HostPort(IComputeBackend backend) : RankPort
{
    private HostMemory _posted = new(0);
    private HostMemory _room = new(0);
    private HostMemory _target = new(0);

    public override TensorSlice Post(TensorSlice source)
    {
        HostMemory memory = Sized(ref _posted, LengthOf(source));
        backend.Download(source, memory.Values.AsSpan(0, LengthOf(source)));
        return memory;
    }

    public override TensorSlice Room(int count) => Sized(ref _room, count);

    public override void Reserve(int count)
    {
        // Host memory is the garbage collector's.
    }

    public override TensorSlice Target(TensorSlice destination) => Sized(ref _target, LengthOf(destination));

    public override void Read(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate) =>
        Rectangle.Move(((HostMemory)source.Tensor).Values, from, ((HostMemory)destination.Tensor).Values, to, accumulate);

    public override void Deliver(TensorSlice destination) =>
        backend.Upload(_target.Values.AsSpan(0, LengthOf(destination)), destination);

    public override void Dispose()
    {
        // The garbage collector's.
    }

    private static int LengthOf(TensorSlice slice) => checked(slice.Rows * slice.Columns);

    // One that is too short is left to those who still read it.
    private static HostMemory Sized(ref HostMemory memory, int count) =>
        memory.Values.Length < count ? memory = new HostMemory(count) : memory;

    /// <summary>An array that is passed around like a tensor.</summary>
    private sealed class HostMemory(int count) : DeviceTensor(1, count)
    {
        public float[] Values { get; } = new float[count];

        public override long Bytes => 0;

        public override void Dispose()
        {
            // The garbage collector's.
        }
    }
}
