using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Primitives;
using FlexLLM.Tests.Contracts;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends.Group;

/// <summary>A row-major matrix on the host: a whole value, or what one rank has of it.</summary>
internal sealed record Piece(int Rows, int Columns, float[] Values)
{
    /// <summary>Magnitudes so different that the order of a sum shows in its bits.</summary>
    public static Piece Random(int rows, int columns, ref SeededRandom random)
    {
        float[] values = new float[rows * columns];
        for (int i = 0; i < values.Length; i++)
        {
            values[i] = (float)(random.NextGaussian() * Math.Pow(10, random.Next(-4, 5)));
        }

        return new Piece(rows, columns, values);
    }

    public Piece RowsOf(int rank, int ranks)
    {
        (int first, int end) = (Rows * rank / ranks, Rows * (rank + 1) / ranks);
        return new Piece(end - first, Columns, Values[(first * Columns)..(end * Columns)]);
    }

    public Piece ColumnsOf(int rank, int ranks)
    {
        int width = Columns / ranks;
        return new Piece(Rows, width, [.. Values.Where((_, i) => i % Columns / width == rank)]);
    }

    public static Piece Sum(IEnumerable<Piece> parts) => parts.Aggregate((a, b) =>
        a with { Values = [.. a.Values.Zip(b.Values, (x, y) => x + y)] });

    public int[] Bits => Array.ConvertAll(Values, BitConverter.SingleToInt32Bits);
}

/// <summary>A group on the ranks of the <see cref="TestDevice"/>; what hangs is a failure.</summary>
internal sealed class GroupRig : IDisposable
{
    private readonly IComputeBackend[] _backends;

    /// <param name="ranks">How many.</param>
    /// <param name="isDirect">Whether they read each other's memory, or values go through the host.</param>
    /// <param name="wrap">Puts something around a rank's backend.</param>
    public GroupRig(int ranks, bool isDirect = true, Func<int, IComputeBackend, IComputeBackend>? wrap = null)
    {
        _backends = [.. Enumerable.Range(0, ranks).Select(rank =>
        {
            IComputeBackend backend = TestDevice.CreateRank(rank);
            backend = isDirect ? backend : new OwnMemoryOnly(backend);
            return wrap is null ? backend : wrap(rank, backend);
        })];
        Group = new InProcessGroup(_backends);
        Assert.That(Group.IsDirect, Is.EqualTo(isDirect));
    }

    public InProcessGroup Group { get; }

    /// <summary>Runs one collective: what each rank brings, and the shape that each takes; the results of all ranks.</summary>
    public Piece[] Run(CollectiveCall collective, Piece[] brought, Func<int, (int Rows, int Columns)> taken)
    {
        Piece[] results = new Piece[Group.Ranks];
        Run(communicator =>
        {
            int rank = communicator.Rank;
            (int rows, int columns) = taken(rank);
            using DeviceTensor source = Upload(rank, brought[rank]);
            using DeviceTensor destination = Upload(rank, new Piece(rows, columns, Filled(rows * columns)));
            collective(communicator, Inside(source), Inside(destination));
            Check.That(Download(rank, source).Bits.SequenceEqual(brought[rank].Bits));
            results[rank] = Download(rank, destination);
        });
        return results;
    }

    /// <summary>All ranks' sums in place.</summary>
    public Piece[] AllReduce(Piece[] partials)
    {
        Piece[] results = new Piece[Group.Ranks];
        Run(communicator =>
        {
            using DeviceTensor x = Upload(communicator.Rank, partials[communicator.Rank]);
            communicator.AllReduce(Inside(x));
            results[communicator.Rank] = Download(communicator.Rank, x);
        });
        return results;
    }

    public void Run(Action<Communicator> body, CancellationToken cancellationToken = default) =>
        Soon(() => Group.Run(body, cancellationToken));

    public DeviceTensor Allocate(int rank, int rows, int columns) => _backends[rank].Allocate(rows, columns);

    public void Upload(int rank, ReadOnlySpan<float> source, TensorSlice destination) =>
        _backends[rank].Upload(source, destination);

    public void Download(int rank, TensorSlice source, Span<float> destination) =>
        _backends[rank].Download(source, destination);

    public static void Soon(Action action) => Task.Run(action).Soon().GetAwaiter().GetResult();

    public void Dispose()
    {
        Group.Dispose();
        foreach (IComputeBackend backend in _backends)
        {
            backend.Dispose();
        }
    }

    // A row of NaN before and after, which nobody may touch.
    private DeviceTensor Upload(int rank, Piece piece)
    {
        DeviceTensor tensor = _backends[rank].Allocate(piece.Rows + 2, piece.Columns);
        float[] guard = Filled(piece.Columns);
        _backends[rank].Upload([.. guard, .. piece.Values, .. guard], tensor);
        return tensor;
    }

    private Piece Download(int rank, DeviceTensor tensor)
    {
        float[] values = new float[tensor.Rows * tensor.Columns];
        _backends[rank].Download(tensor, values);
        (int rows, int columns) = (tensor.Rows - 2, tensor.Columns);
        Assert.That(values[..columns].Concat(values[^columns..]), Is.All.NaN, "guard rows");
        return new Piece(rows, columns, values[columns..^columns]);
    }

    /// <summary>Reads nobody else's memory.</summary>
    public sealed class OwnMemoryOnly(IComputeBackend inner) : DelegatingBackend(inner)
    {
        public override string? PeerKind => null;
    }

    private static TensorSlice Inside(DeviceTensor tensor) => tensor.Slice(1, tensor.Rows - 2);

    private static float[] Filled(int count) => [.. Enumerable.Repeat(float.NaN, count)];
}

/// <summary>One of a communicator's collectives.</summary>
internal delegate void CollectiveCall(Communicator communicator, TensorSlice source, TensorSlice destination);
