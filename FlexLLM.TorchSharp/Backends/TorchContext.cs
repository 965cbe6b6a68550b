using System.Runtime.InteropServices;
using FlexLLM.Backends.Cpu;
using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// What the operations share. Every operation opens a dispose scope and leaves no tensor behind in it; those that live longer
/// are detached from any scope by the object that owns them.
/// </summary>
internal sealed class TorchContext : IDisposable
{
    /// <summary>16 Mi elements: 64 MiB.</summary>
    public const long ElementsMaxDefault = 16L << 20;

    private readonly Dictionary<double, Scalar> _scalars = [];
    private readonly torch.Device _host = new(DeviceType.CPU);
    private readonly KeptIndices _kept;
    private long[] _indices = [];

    /// <param name="device">Where tensors live.</param>
    /// <param name="elementsMax">See <see cref="ElementsMax"/>.</param>
    /// <param name="indicesKept">See <see cref="KeptIndices"/>.</param>
    /// <param name="kvType">See <see cref="KvType"/>.</param>
    /// <param name="gpu">Which model of GPU the device is; null on the host, or where nobody knows.</param>
    public TorchContext(
        torch.Device device, long elementsMax, int indicesKept = KeptIndices.CountDefault, DType kvType = DType.F32, string? gpu = null)
    {
        Check.That(elementsMax > 0);
        Check.That(kvType is DType.F32 or DType.BF16);
        (Device, ElementsMax, KvType) = (device, elementsMax, kvType);
        _kept = new KeptIndices(indicesKept);
        OnHost = device.type == DeviceType.CPU;

        // What changes the time of a step is part of it: profiles of other devices are not read.
        string name = OnHost ? "cpu" : gpu is null ? $"cuda:{device.index}" : $"cuda:{device.index}, {gpu}";
        Name = kvType == DType.F32 ? $"torch ({name})" : $"torch ({name}, {kvType} KV cache)";
        Zero = 0.0;
        One = 1.0;
        MinusOne = -1.0;
        MinusInfinity = double.NegativeInfinity;
    }

    public torch.Device Device { get; }

    /// <summary>
    /// Elements of a temporary that grows with two sides of a call (scores, logits) or only passes through (copies): larger ones
    /// are made in pieces, of one row at least.
    /// </summary>
    public long ElementsMax { get; }

    /// <summary>What KV caches hold, F32 or BF16; products with it are F32 either way.</summary>
    public DType KvType { get; }

    /// <summary>Device memory is host memory.</summary>
    public bool OnHost { get; }

    /// <summary>Names the model of GPU too: times that were measured on one are not another's.</summary>
    public string Name { get; }

    public MemoryCounter Memory { get; } = new();

    /// <summary>Index tensors that were made: on a GPU one copy to the device each.</summary>
    public long IndexUploads { get; private set; }

    public Scalar Zero { get; }

    public Scalar One { get; }

    public Scalar MinusOne { get; }

    public Scalar MinusInfinity { get; }

    /// <summary>The elements of a slice as a tensor [rows, columns] on the same memory; of the scope that is open.</summary>
    public static Tensor Of(TensorSlice slice) => ((TorchTensor)slice.Tensor).Part(slice.Start, slice.Rows);

    /// <summary>A rectangle inside a slice as a tensor [rows, columns] on the same memory; of the scope that is open.</summary>
    public static Tensor Of(TensorSlice slice, Rectangle place) => ((TorchTensor)slice.Tensor).Part(
        place with { Start = ((long)slice.Start * slice.Columns) + place.Start });

    /// <summary>destination (+)= values, of one shape.</summary>
    public static void Store(Tensor values, Tensor destination, bool accumulate)
    {
        if (accumulate)
        {
            destination.add_(values);
        }
        else
        {
            destination.copy_(values);
        }
    }

    /// <summary>
    /// A number that stays the same for a model. Making one costs more than a small operation does, so they are kept; what changes
    /// with every step belongs to <see cref="Passing"/>.
    /// </summary>
    public Scalar Constant(double value)
    {
        if (!_scalars.TryGetValue(value, out Scalar? scalar))
        {
            _scalars.Add(value, scalar = value);
        }

        return scalar;
    }

    /// <summary>A number that the caller disposes.</summary>
    public static Scalar Passing(double value) => value;

    /// <summary>Rows of so many elements that a temporary may hold.</summary>
    public int RowsPerPiece(long columns) => (int)Math.Clamp(ElementsMax / Math.Max(1L, columns), 1, int.MaxValue);

    /// <summary>A buffer on the host for so many indices, valid until the next call.</summary>
    public Span<long> IndexBuffer(int count)
    {
        if (_indices.Length < count)
        {
            _indices = new long[Math.Max(count, 2 * _indices.Length)];
        }

        return _indices.AsSpan(0, count);
    }

    /// <summary>
    /// Indices on the device, only to be read. The layers of a step ask for the same ones: they are copied once.
    /// </summary>
    public Tensor Indices(ReadOnlySpan<long> values)
    {
        if (_kept.Find(values) is Tensor kept)
        {
            return kept;
        }

        IndexUploads++;
        Tensor host = torch.empty((long)values.Length, torch.ScalarType.Int64, _host);
        MemoryMarshal.AsBytes(values).CopyTo(host.bytes);
        return _kept.Keep(values, OnHost ? host : host.to(Device));
    }

    /// <summary>Indices on the device, each from 0 to less than <paramref name="end"/>.</summary>
    public Tensor Indices(ReadOnlySpan<int> values, int end)
    {
        Check.That(values.IndexOfAnyExceptInRange(0, end - 1) < 0);
        Span<long> wide = IndexBuffer(values.Length);
        for (int i = 0; i < values.Length; i++)
        {
            wide[i] = values[i];
        }

        return Indices(wide);
    }

    public void Upload(ReadOnlySpan<float> source, TensorSlice destination)
    {
        Check.That(source.Length == (long)destination.Rows * destination.Columns);
        int chunk = RowsPerPiece(destination.Columns);
        for (int row = 0; row < destination.Rows; row += chunk)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            int count = Math.Min(chunk, destination.Rows - row);
            ReadOnlySpan<float> floats = source.Slice(row * destination.Columns, count * destination.Columns);
            Write(MemoryMarshal.AsBytes(floats), Of(destination.Slice(row, count)), count, destination.Columns);
        }
    }

    public void Download(TensorSlice source, Span<float> destination)
    {
        Check.That(destination.Length == (long)source.Rows * source.Columns);
        int chunk = RowsPerPiece(source.Columns);
        for (int row = 0; row < source.Rows; row += chunk)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            int count = Math.Min(chunk, source.Rows - row);
            Tensor rows = Of(source.Slice(row, count));
            Span<float> floats = destination.Slice(row * source.Columns, count * source.Columns);
            (OnHost ? rows : rows.cpu()).bytes.CopyTo(MemoryMarshal.AsBytes(floats));
        }
    }

    /// <summary>Converts a matrix in host memory to the type of the destination, [rows, columns], in bounded pieces.</summary>
    public unsafe void Upload(in HostMatrix source, Tensor destination)
    {
        torch.ScalarType type = source.Type switch
        {
            DType.F32 => torch.ScalarType.Float32,
            DType.F16 => torch.ScalarType.Float16,
            _ => torch.ScalarType.BFloat16,
        };
        int rowBytes = source.Columns * DTypes.BytesOf(source.Type);
        int chunk = RowsPerPiece(source.Columns);
        for (int row = 0; row < source.Rows; row += chunk)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            int count = Math.Min(chunk, source.Rows - row);
            ReadOnlySpan<byte> bytes = new(source.Data + ((long)row * rowBytes), count * rowBytes);
            Tensor staging = torch.empty((long)count, (long)source.Columns, type, _host);
            bytes.CopyTo(staging.bytes);

            // The conversion runs where the weight lives; narrowing to BF16 rounds to nearest even.
            destination.narrow(0, row, count).copy_(OnHost ? staging : staging.to(Device));
        }
    }

    public void Dispose()
    {
        _kept.Dispose();
        foreach (Scalar scalar in _scalars.Values)
        {
            scalar.Dispose();
        }

        Zero.Dispose();
        One.Dispose();
        MinusOne.Dispose();
        MinusInfinity.Dispose();
    }

    private void Write(ReadOnlySpan<byte> bytes, Tensor destination, long rows, long columns)
    {
        if (OnHost)
        {
            bytes.CopyTo(destination.bytes);
            return;
        }

        Tensor staging = torch.empty(rows, columns, torch.ScalarType.Float32, _host);
        bytes.CopyTo(staging.bytes);
        destination.copy_(staging);
    }
}
