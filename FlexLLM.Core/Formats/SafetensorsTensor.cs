using System.Numerics.Tensors;
using System.Runtime.InteropServices;
using FlexLLM.Primitives;

namespace FlexLLM.Formats;

/// <summary>One tensor inside an open <see cref="SafetensorsFile"/>. Its memory is valid until that file is disposed.</summary>
internal sealed unsafe class SafetensorsTensor
{
    private readonly SafetensorsFile _file;
    private readonly long _begin;

    internal SafetensorsTensor(SafetensorsFile file, SafetensorsHeader.Entry entry)
    {
        _file = file;
        _begin = entry.Begin;
        Name = entry.Name;
        Type = entry.Type;
        Shape = entry.Shape;
        Count = entry.Count;
        Bytes = entry.Bytes;
    }

    public string Name { get; }

    /// <summary>Path of the file that holds the tensor, for error messages.</summary>
    public string File => _file.Path;

    public StoredType Type { get; }

    /// <summary>Sizes, outermost first; empty for a scalar.</summary>
    public IReadOnlyList<long> Shape { get; }

    /// <summary>Elements.</summary>
    public long Count { get; }

    /// <summary>Bytes of the data.</summary>
    public long Bytes { get; }

    /// <summary>The first element, row-major, little-endian, aligned only as well as the file is.</summary>
    /// <exception cref="ObjectDisposedException">The file is closed.</exception>
    public byte* Data => _file.AddressOf(_begin);

    /// <summary>The raw bytes of a tensor below 2 GiB.</summary>
    public ReadOnlySpan<byte> AsBytes() => Bytes <= int.MaxValue
        ? new ReadOnlySpan<byte>(Data, (int)Bytes)
        : throw Fault($"has {Bytes} bytes, too many for one span");

    /// <summary>The tensor as a matrix of weights: (n) becomes 1 x n, (m, n) becomes m x n.</summary>
    /// <exception cref="InvalidFileException">Not F32, F16 or BF16, not of rank 1 or 2, or a side beyond 2^31 - 1.</exception>
    public HostMatrix AsMatrix()
    {
        if (!StoredTypes.TryToDType(Type, out DType type))
        {
            throw Fault($"is stored as {StoredTypes.NameOf(Type)}; weights must be F32, F16 or BF16");
        }

        if (Shape.Count is not (1 or 2))
        {
            throw Fault($"has shape [{string.Join(", ", Shape)}]; a vector or a matrix is needed");
        }

        (long rows, long columns) = Shape.Count == 1 ? (1, Shape[0]) : (Shape[0], Shape[1]);
        return rows <= int.MaxValue && columns <= int.MaxValue
            ? new HostMatrix(Data, type, (int)rows, (int)columns)
            : throw Fault($"has shape [{string.Join(", ", Shape)}], too large for a matrix");
    }

    /// <summary>A copy of an F32, F16 or BF16 tensor, widened exactly.</summary>
    public float[] ToFloats()
    {
        if (!StoredTypes.TryToDType(Type, out DType type))
        {
            throw Fault($"is stored as {StoredTypes.NameOf(Type)}; F32, F16 or BF16 is needed");
        }

        var values = new float[AsBytes().Length / DTypes.BytesOf(type)];
        switch (type)
        {
            case DType.F32:
                MemoryMarshal.Cast<byte, float>(AsBytes()).CopyTo(values);
                break;
            case DType.F16:
                TensorPrimitives.ConvertToSingle(MemoryMarshal.Cast<byte, Half>(AsBytes()), values);
                break;
            default:
                ReadOnlySpan<ushort> halves = MemoryMarshal.Cast<byte, ushort>(AsBytes());
                for (int i = 0; i < values.Length; i++)
                {
                    values[i] = BitConverter.UInt32BitsToSingle((uint)halves[i] << 16);
                }

                break;
        }

        return values;
    }

    /// <summary>A copy of an F64 tensor, or of a narrower float tensor widened exactly.</summary>
    public double[] ToDoubles() => Type == StoredType.F64
        ? MemoryMarshal.Cast<byte, double>(AsBytes()).ToArray()
        : Array.ConvertAll(ToFloats(), value => (double)value);

    /// <summary>A copy of an I64 or I32 tensor.</summary>
    public long[] ToInt64s()
    {
        switch (Type)
        {
            case StoredType.I64:
                return MemoryMarshal.Cast<byte, long>(AsBytes()).ToArray();
            case StoredType.I32:
                return Array.ConvertAll(MemoryMarshal.Cast<byte, int>(AsBytes()).ToArray(), value => (long)value);
            default:
                throw Fault($"is stored as {StoredTypes.NameOf(Type)}; I64 or I32 is needed");
        }
    }

    private InvalidFileException Fault(string fault) => new(_file.Path, Name, fault);
}
