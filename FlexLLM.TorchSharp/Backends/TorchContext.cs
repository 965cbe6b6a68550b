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

    // Indices of dozens of steps: 8 MiB of the host's memory. On the host nothing is gained by many.
    private const int StagedOnGpu = 1 << 20;
    private const int StagedOnHost = 1 << 13;

    private readonly Dictionary<double, Scalar> _scalars = [];
    private readonly Dictionary<double, Tensor> _numbers = [];
    private readonly torch.Device _host = new(DeviceType.CPU);
    private readonly IndexStaging _staging;
    private readonly KeptIndices _kept;
    private readonly KeptResults _results = new();
    private long[] _indices = [];
    private Tensor? _bitValues;

    /// <param name="device">Where tensors live.</param>
    /// <param name="elementsMax">See <see cref="ElementsMax"/>.</param>
    /// <param name="indicesKept">See <see cref="KeptIndices"/>.</param>
    /// <param name="kvType">See <see cref="KvType"/>.</param>
    /// <param name="gpu">Which model of GPU the device is; null on the host, or where nobody knows.</param>
    /// <param name="multipliesBf16">See <see cref="MultipliesBf16"/>; null is what suits the device.</param>
    /// <param name="activationType">See <see cref="ActivationType"/>.</param>
    public TorchContext(
        torch.Device device, long elementsMax, int indicesKept = KeptIndices.CountDefault, DType kvType = DType.F32, string? gpu = null,
        bool? multipliesBf16 = null, DType activationType = DType.F32)
    {
        Check.That(elementsMax > 0);
        Check.That(kvType is DType.F32 or DType.BF16);
        Check.That(activationType is DType.F32 or DType.BF16);
        (Device, ElementsMax, KvType, ActivationType) = (device, elementsMax, kvType, activationType);
        _kept = new KeptIndices(indicesKept);
        OnHost = device.type == DeviceType.CPU;
        MultipliesBf16 = multipliesBf16 ?? !OnHost;
        _staging = OnHost
            ? new IndexStaging(device, StagedOnHost, Synchronize)
            : new IndexStaging(device, StagedOnGpu, Synchronize, (address, bytes) => CudaDriver.Pin(device.index, address, bytes));

        // What changes the time of a step is part of it: profiles of other devices are not read.
        string name = OnHost ? "cpu" : gpu is null ? $"cuda:{device.index}" : $"cuda:{device.index}, {gpu}";
        string kv = kvType == DType.F32 ? "" : $", {kvType} KV cache";
        string activations = activationType == DType.F32 ? "" : $", {activationType} activations";
        Name = $"torch ({name}{kv}{activations})";
    }

    public torch.Device Device { get; }

    /// <summary>
    /// Elements of a temporary that grows with two sides of a call (scores, logits) or only passes through (copies): larger ones
    /// are made in pieces, of one row at least.
    /// </summary>
    public long ElementsMax { get; }

    /// <summary>What KV caches hold, F32 or BF16; products with it are F32 either way, but see <see cref="AttendsInBf16"/>.</summary>
    public DType KvType { get; }

    /// <summary>
    /// What rows of a model's values and their gradients are kept in, F32 or BF16. Operations widen what they read and round what they
    /// write once, but for products of BF16 operands, gates and rotations, whose in-place steps round each.
    /// </summary>
    public DType ActivationType { get; }

    /// <summary>Device memory is host memory.</summary>
    public bool OnHost { get; }

    /// <summary>Names the model of GPU too: times that were measured on one are not another's.</summary>
    public string Name { get; }

    /// <summary>
    /// Products with a BF16 weight are made of BF16 operands, as a GPU makes them fast: it sums in F32 and rounds the result, and partial
    /// sums where cuBLAS adds those in BF16, which libtorch lets it and TorchSharp has no switch against. On the host, and on GPUs that do
    /// not multiply BF16, where such products are slow, the weight is widened for the call instead.
    /// </summary>
    public bool MultipliesBf16 { get; }

    /// <summary>
    /// Requests attend in BF16, where queries, keys and values are that and BF16 operands are multiplied as they are: a GPU's fused
    /// attention reads what was gathered once, where F32 products would have it widened and read twice. It sums in F32, and rounds
    /// probabilities before they meet the values.
    /// </summary>
    public bool AttendsInBf16 => MultipliesBf16 && KvType == DType.BF16 && ActivationType == DType.BF16;

    /// <summary>The rows that were rounded for a product last.</summary>
    public SharedRounding Rounding { get; } = new();

    public MemoryCounter Memory { get; } = new();

    /// <summary>What the bits of a byte count for, the lowest first; it stays this object's.</summary>
    public Tensor BitValues => _bitValues ??= MakeBitValues();

    /// <summary>Index tensors that were made: on a GPU one copy to the device each.</summary>
    public long IndexUploads { get; private set; }

    public static Scalar Zero { get; } = 0.0;

    public static Scalar One { get; } = 1.0;

    public static Scalar MinusOne { get; } = -1.0;

    public static Scalar MinusInfinity { get; } = double.NegativeInfinity;

    /// <summary>
    /// The elements of a slice as a tensor [rows, columns] on the same memory. It stays the slice's owner's: see <see cref="KeptViews"/>.
    /// </summary>
    public static Tensor Of(TensorSlice slice) => Of(slice, ViewShape.Matrix(slice.Rows, slice.Columns));

    /// <summary>The same in another shape, from the first element of the slice on.</summary>
    public static Tensor Of(TensorSlice slice, in ViewShape shape) => ((TorchTensor)slice.Tensor).Part(slice.Start, slice.Rows, shape);

    /// <summary>The same, only to be read: an adapter's product between those of q, k and v takes nothing from them.</summary>
    public static Tensor ToRead(TensorSlice slice) => ((TorchTensor)slice.Tensor).PartToRead(slice.Start, slice.Rows);

    /// <summary>
    /// A slice as the input of a product with a BF16 matrix, only to be read: rounded to BF16, once for all products of the same rows.
    /// </summary>
    public static Tensor Rounded(TensorSlice slice) => ((TorchTensor)slice.Tensor).Rounded(slice.Start, slice.Rows);

    /// <summary>Whether both are the same elements, under whatever name.</summary>
    public static bool IsSame(TensorSlice a, TensorSlice b) =>
        a.Rows == b.Rows && a.Columns == b.Columns && ((TorchTensor)a.Tensor).IsAt((TorchTensor)b.Tensor, a.Start, b.Start);

    /// <summary>The elements of a slice in F32, only to be read: themselves, or a copy of the scope that is open.</summary>
    public static Tensor Wide(TensorSlice slice) => Wide(slice, ViewShape.Matrix(slice.Rows, slice.Columns));

    /// <summary>The same in another shape.</summary>
    public static Tensor Wide(TensorSlice slice, in ViewShape shape) =>
        IsBf16(slice) ? Of(slice, shape).to_type(torch.ScalarType.Float32) : Of(slice, shape);

    public static bool IsBf16(TensorSlice slice) => slice.Tensor.Type == DType.BF16;

    public static torch.ScalarType ScalarTypeOf(DType type) =>
        type == DType.F32 ? torch.ScalarType.Float32 : torch.ScalarType.BFloat16;

    /// <summary>
    /// Copies in F32, each as large as an operand, that an operation on BF16 activations makes at most beside its results: of what it
    /// reads, and on the host, where libtorch first brings operands of two types to one, of operand and result.
    /// </summary>
    public int WideCopies => ActivationType == DType.F32 ? 0 : OnHost ? 3 : 1;

    /// <summary>A rectangle inside a slice as a tensor [rows, columns] on the same memory; of the scope that is open.</summary>
    public static Tensor Of(TensorSlice slice, Rectangle place) => ((TorchTensor)slice.Tensor).Part(InTensor(slice, place));

    /// <summary>The same, only to be read, by whatever thread.</summary>
    public static Tensor ToRead(TensorSlice slice, Rectangle place) => ((TorchTensor)slice.Tensor).PartToRead(InTensor(slice, place));

    /// <summary>destination (+)= values, of one shape.</summary>
    public static void Store(Tensor values, Tensor destination, bool accumulate)
    {
        if (accumulate)
        {
            // Without the number TorchSharp makes one for each call, which costs more than the sum.
            destination.add_(values, One);
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

    /// <summary>Such a number as an F32 tensor [1, 1] on the device, for operations that take no <see cref="Scalar"/>.</summary>
    public Tensor Number(double value)
    {
        if (!_numbers.TryGetValue(value, out Tensor? number))
        {
            _numbers.Add(value, number = torch.zeros(1, 1, torch.ScalarType.Float32, Device).DetachFromDisposeScope());
            number.fill_(Constant(value));
        }

        return number;
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
    public Tensor Indices(ReadOnlySpan<long> values) =>
        _kept.Find(values) ?? _kept.Keep(values, sizeof(long) * (long)values.Length, ToDevice(values));

    /// <summary>
    /// Indices of some kind, or a mask, for all positions of sequences, [sequences * end]. They are told apart by the block tables, a
    /// sixteenth as many numbers: a layer that finds those of the layer before it neither makes nor compares them.
    /// </summary>
    public Tensor Indices(SequenceIndices kind, ReadOnlySpan<AttentionSegment> segments, int end)
    {
        int count = segments.Length * end;
        Span<long> both = IndexBuffer(SequenceIndices.KeyLengthMax(segments.Length, end) + count);
        Span<long> key = both[..kind.WriteKey(segments, end, both)];
        if (_kept.Find(key) is Tensor kept)
        {
            return kept;
        }

        Span<long> values = both.Slice(key.Length, count);
        kind.Write(segments, end, values);
        Tensor made = ToDevice(values);
        return kind.IsMask ? _kept.Keep(key, count, made.gt(Zero)) : _kept.Keep(key, sizeof(long) * (long)count, made);
    }

    /// <summary>
    /// A tensor of so many bytes that follows from a few numbers, only to be read; the first of them is negative and the caller's own. The
    /// layers of a step ask for the same ones: it is made once.
    /// </summary>
    public Tensor Kept(ReadOnlySpan<long> key, long bytes, Func<Tensor> make) => _kept.Find(key) ?? _kept.Keep(key, bytes, make());

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

    /// <summary>
    /// What <paramref name="make"/> makes of an index tensor, only to be read: made once for all layers of a step where the index
    /// tensor is kept.
    /// </summary>
    /// <param name="indices">From <see cref="Indices(ReadOnlySpan{long})"/>.</param>
    /// <param name="kind">What else it is made of: compared by identity.</param>
    /// <param name="variant">Which of two things that are made of them.</param>
    /// <param name="make">Makes it in the scope that is open.</param>
    public Tensor[] Results<TKind>(Tensor indices, TKind kind, bool variant, Func<Tensor, TKind, bool, Tensor[]> make)
        where TKind : class
    {
        if (_results.Find(indices, kind, variant) is Tensor[] known)
        {
            return known;
        }

        Tensor[] made = make(indices, kind, variant);
        return _kept.Has(indices) ? _results.Keep(indices, kind, variant, made) : made;
    }

    /// <summary>What is kept from layer to layer is from now on what steps within these limits ask for.</summary>
    public void Fit(in ScratchLimits limits) => _kept.Fit(limits);

    /// <summary>Waits until the device has done all that it was told to.</summary>
    public void Synchronize()
    {
        if (!OnHost)
        {
            torch.cuda.synchronize(Device);
            torch.CheckForErrors(); // Which synchronize itself leaves to the next call.
        }

        _staging.Arrived();
    }

    public void Upload(ReadOnlySpan<float> source, TensorSlice destination)
    {
        Check.That(source.Length == (long)destination.Rows * destination.Columns);

        // It may be a table that something was made of.
        _results.Dispose();
        int chunk = RowsPerPiece(destination.Columns);
        for (int row = 0; row < destination.Rows; row += chunk)
        {
            using DisposeScope scope = torch.NewDisposeScope();
            int count = Math.Min(chunk, destination.Rows - row);
            ReadOnlySpan<float> floats = source.Slice(row * destination.Columns, count * destination.Columns);
            Write(MemoryMarshal.AsBytes(floats), destination.Slice(row, count));
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
            Tensor onHost = OnHost ? rows : rows.cpu();
            (IsBf16(source) ? onHost.to_type(torch.ScalarType.Float32) : onHost).bytes.CopyTo(MemoryMarshal.AsBytes(floats));
        }

        if (source.Rows > 0)
        {
            _staging.Arrived(); // What comes back was computed after all that went there.
        }
    }

    /// <summary>Converts a matrix in host memory to the type of the destination, [rows, columns], in bounded pieces.</summary>
    public unsafe void Upload(in HostMatrix source, Tensor destination)
    {
        torch.ScalarType type = source.Type == DType.F16 ? torch.ScalarType.Float16 : ScalarTypeOf(source.Type);
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
        Rounding.Dispose();
        _results.Dispose();
        _kept.Dispose();
        _staging.Dispose();
        _bitValues?.Dispose();
        foreach (Tensor number in _numbers.Values)
        {
            number.Dispose();
        }

        foreach (Scalar scalar in _scalars.Values)
        {
            scalar.Dispose();
        }
    }

    private Tensor MakeBitValues()
    {
        using Tensor onHost = torch.empty(8, torch.ScalarType.Byte, _host);
        ReadOnlySpan<byte> values = [1, 2, 4, 8, 16, 32, 64, 128];
        values.CopyTo(onHost.bytes);
        return onHost.to(Device, copy: true).DetachFromDisposeScope();
    }

    private Tensor ToDevice(ReadOnlySpan<long> values)
    {
        IndexUploads++;
        return _staging.Copy(values);
    }

    private static Rectangle InTensor(TensorSlice slice, Rectangle place) =>
        place with { Start = ((long)slice.Start * slice.Columns) + place.Start };

    private void Write(ReadOnlySpan<byte> bytes, TensorSlice destination)
    {
        if (OnHost && !IsBf16(destination))
        {
            bytes.CopyTo(Of(destination).bytes);
            return;
        }

        Tensor staging = torch.empty((long)destination.Rows, (long)destination.Columns, torch.ScalarType.Float32, _host);
        bytes.CopyTo(staging.bytes);
        Of(destination).copy_(staging);
    }
}
