using System.Buffers.Binary;
using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>What one check puts on a device, freed at its end. Call <see cref="Verify"/> last.</summary>
internal sealed class Workbench(IComputeBackend backend) : IDisposable
{
    private readonly List<IDisposable> _owned = [];
    private readonly List<Operand> _operands = [];
    private readonly DType _activations = ActivationsOf(backend);
    private SeededRandom _random = new(20);

    public IComputeBackend Backend { get; } = backend;

    public ref SeededRandom Chance => ref _random;

    /// <summary>Numbers that the backend's activations hold exactly.</summary>
    public Matrix Random(int rows, int columns, double scale = 1) => Held(Matrix.Random(ref _random, rows, columns, scale));

    /// <summary>What the backend's activations hold of these numbers.</summary>
    public Matrix Held(Matrix values) => _activations == DType.F32 ? values : values.Rounded(_activations);

    /// <summary>A slice that the operation only reads, between guard rows of NaN.</summary>
    public Operand Source(Matrix values) => Add(new Operand(Backend, values, TensorUse.Activation, guardRows: 3, readOnly: true));

    /// <summary>A slice that the operation may write, between guard rows of NaN.</summary>
    public Operand Target(Matrix initial, TensorUse use = TensorUse.Activation) =>
        Add(new Operand(Backend, initial, use, guardRows: 2, readOnly: false));

    /// <summary>A target whose old content must not matter.</summary>
    public Operand Output(int rows, int columns, TensorUse use = TensorUse.Activation) =>
        Target(Matrix.Filled(rows, columns, double.NaN), use);

    /// <summary>A whole tensor that the operation only reads.</summary>
    public DeviceTensor Constant(Matrix values) =>
        Add(new Operand(Backend, values, TensorUse.Exact, guardRows: 0, readOnly: true)).Tensor;

    /// <summary>A whole tensor that the operation may write.</summary>
    public Operand Accumulator(Matrix initial) => Add(new Operand(Backend, initial, TensorUse.Exact, guardRows: 0, readOnly: false));

    public unsafe DeviceWeight Weight(Matrix values, DType type, DType sourceType)
    {
        fixed (byte* data = Encode(values, sourceType))
        {
            return Own(Backend.CreateWeight(new HostMatrix(data, sourceType, values.Rows, values.Columns), type));
        }
    }

    /// <summary>A random weight, and its values as stored.</summary>
    public (DeviceWeight Weight, Matrix Values) RandomWeight(int rows, int columns, DType type)
    {
        Matrix values = Random(rows, columns);
        return (Weight(values, type, DType.F32), values.Rounded(type));
    }

    public DeviceFactor Factor(Matrix values)
    {
        DeviceFactor factor = Own(Backend.CreateFactor(values.Rows, values.Columns));
        Backend.Upload(values.ToFloats(), factor.Values);
        Backend.RefreshFactor(factor);
        return factor;
    }

    /// <summary>What rows of so many columns are packed into.</summary>
    public DeviceTensor Packed(int rows, int columns, PackedFormat format) =>
        Own(Backend.Allocate(rows, PackedFormats.PackedColumns(columns, format), TensorUses.Of(format)));

    public T Own<T>(T resource)
        where T : IDisposable
    {
        _owned.Add(resource);
        return resource;
    }

    /// <summary>No guard row and no source changed.</summary>
    public void Verify() => _operands.ForEach(operand => operand.Verify());

    public void Dispose() => _owned.ForEach(resource => resource.Dispose());

    private static DType ActivationsOf(IComputeBackend backend)
    {
        using DeviceTensor tensor = backend.Allocate(1, 1, TensorUse.Activation);
        return tensor.Type;
    }

    private static byte[] Encode(Matrix values, DType type)
    {
        int size = DTypes.BytesOf(type);
        byte[] bytes = new byte[values.Values.Length * size];
        for (int i = 0; i < values.Values.Length; i++)
        {
            Span<byte> at = bytes.AsSpan(i * size, size);
            float value = (float)values.Values[i];
            switch (type)
            {
                case DType.F32:
                    BinaryPrimitives.WriteSingleLittleEndian(at, value);
                    break;
                case DType.F16:
                    BinaryPrimitives.WriteHalfLittleEndian(at, (Half)value);
                    break;
                default:
                    BinaryPrimitives.WriteUInt16LittleEndian(at, (ushort)(BitConverter.SingleToUInt32Bits(value) >> 16));
                    break;
            }
        }

        return bytes;
    }

    private Operand Add(Operand operand)
    {
        Own(operand.Tensor);
        _operands.Add(operand);
        return operand;
    }
}

/// <summary>A tensor on the device whose guard rows, and interior if read-only, must keep their bits.</summary>
internal sealed class Operand
{
    private readonly IComputeBackend _backend;
    private readonly Matrix _initial;
    private readonly int _guardRows;
    private readonly bool _readOnly;

    public Operand(IComputeBackend backend, Matrix values, TensorUse use, int guardRows, bool readOnly)
    {
        (_backend, _initial, _guardRows, _readOnly) = (backend, values.Copy(), guardRows, readOnly);
        Tensor = backend.Allocate(values.Rows + (2 * guardRows), values.Columns, use);
        Matrix all = Matrix.Filled(Tensor.Rows, values.Columns, double.NaN);
        all.SetRows(guardRows, values);
        backend.Upload(all.ToFloats(), Tensor);
    }

    public DeviceTensor Tensor { get; }

    public TensorSlice All => Tensor.Slice(_guardRows, _initial.Rows);

    public static implicit operator TensorSlice(Operand operand) => operand.All;

    public TensorSlice Slice(int start, int count) => All.Slice(start, count);

    public Matrix Read() => Read(All);

    public void Verify()
    {
        Matrix all = Read(Tensor);
        Matrix guard = Matrix.Filled(_guardRows, Tensor.Columns, float.NaN);
        Expect.SameBits("guard rows before", all.Slice(0, _guardRows), guard);
        Expect.SameBits("guard rows after", all.Slice(Tensor.Rows - _guardRows, _guardRows), guard);
        if (_readOnly)
        {
            Expect.SameBits("a source", all.Slice(_guardRows, _initial.Rows), _initial);
        }
    }

    private Matrix Read(TensorSlice slice)
    {
        float[] values = new float[slice.Rows * slice.Columns];
        _backend.Download(slice, values);
        Matrix read = Matrix.FromFloats(slice.Rows, slice.Columns, values);
        read.Type = Tensor.Type;
        return read;
    }
}
