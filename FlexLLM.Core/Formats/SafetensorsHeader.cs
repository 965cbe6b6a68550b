using System.Text.Json;

namespace FlexLLM.Formats;

/// <summary>
/// The checked header of a safetensors file. Follows the reference implementation: tensors tile the data without hole,
/// overlap or rest, so that every later access is in range by construction.
/// </summary>
internal sealed class SafetensorsHeader
{
    /// <summary>Largest header, in bytes.</summary>
    public const long BytesMax = 100L << 20;

    /// <summary>Most tensors in one file or one checkpoint.</summary>
    public const int TensorsMax = 1_000_000;

    /// <summary>Most dimensions of one tensor.</summary>
    public const int RankMax = 16;

    /// <summary>The key that holds metadata instead of a tensor.</summary>
    public const string MetadataKey = "__metadata__";

    private readonly string _file;

    private SafetensorsHeader(string file) => _file = file;

    public List<Entry> Tensors { get; } = [];

    public Dictionary<string, string> Metadata { get; } = [];

    /// <summary>Checks the declared header length against the file.</summary>
    /// <param name="declared">The first eight bytes.</param>
    /// <param name="fileBytes">Length of the whole file.</param>
    /// <param name="file">File named in errors.</param>
    public static int CheckLength(ulong declared, long fileBytes, string file)
    {
        if (declared > (ulong)BytesMax)
        {
            throw new InvalidFileException(file, "header", $"declares {declared} bytes; at most {BytesMax} are read");
        }

        if ((long)declared > fileBytes - 8)
        {
            throw new InvalidFileException(file, "header", $"declares {declared} bytes, but only {fileBytes - 8} follow");
        }

        return (int)declared;
    }

    /// <summary>Parses the header and checks it against the number of data bytes that follow it.</summary>
    public static SafetensorsHeader Parse(ReadOnlySpan<byte> json, long dataBytes, string file)
    {
        if (json.IsEmpty || json[0] != (byte)'{')
        {
            throw new InvalidFileException(file, "header", "must begin with '{'");
        }

        var header = new SafetensorsHeader(file);
        foreach (JsonProperty property in JsonFile.Parse(json, file, "header").EnumerateObject())
        {
            if (property.NameEquals(MetadataKey))
            {
                header.ReadMetadata(property.Value);
                continue;
            }

            if (header.Tensors.Count == TensorsMax)
            {
                throw new InvalidFileException(file, "header", $"has more than {TensorsMax} tensors");
            }

            header.Tensors.Add(header.ReadTensor(property.Name, property.Value, dataBytes));
        }

        header.CheckTiling(dataBytes);
        return header;
    }

    private void ReadMetadata(JsonElement value)
    {
        if (value.ValueKind != JsonValueKind.Object)
        {
            throw new InvalidFileException(_file, MetadataKey, $"must be an object, not {JsonFields.Kind(value)}");
        }

        foreach (JsonProperty property in value.EnumerateObject())
        {
            if (property.Value.ValueKind != JsonValueKind.String)
            {
                throw Fault(
                    MetadataKey, $"{JsonFile.Quote(property.Name)} must be a string, not {JsonFields.Kind(property.Value)}");
            }

            Metadata.Add(property.Name, property.Value.GetString()!);
        }
    }

    private Entry ReadTensor(string name, JsonElement value, long dataBytes)
    {
        if (value.ValueKind != JsonValueKind.Object)
        {
            throw Fault(name, $"must be an object, not {JsonFields.Kind(value)}");
        }

        StoredType type = ReadType(name, value);
        long[] shape = ReadIntegers(name, value, "shape", RankMax);
        long[] offsets = ReadIntegers(name, value, "data_offsets", 2);
        if (offsets.Length != 2)
        {
            throw Fault(name, "data_offsets must have two numbers: begin and end");
        }

        (long begin, long end) = (offsets[0], offsets[1]);
        if (begin > end)
        {
            throw Fault(name, $"data_offsets are reversed: {begin} to {end}");
        }

        if (end > dataBytes)
        {
            throw Fault(name, $"data_offsets end at {end}, but the file has only {dataBytes} data bytes");
        }

        long count = 1;
        long bytes;
        try
        {
            foreach (long size in shape)
            {
                count = checked(count * size);
            }

            bytes = checked(count * StoredTypes.BytesOf(type));
        }
        catch (OverflowException)
        {
            throw Fault(name, $"shape [{string.Join(", ", shape)}] overflows");
        }

        if (bytes != end - begin)
        {
            string what = $"shape [{string.Join(", ", shape)}] of {StoredTypes.NameOf(type)}";
            throw Fault(name, $"{what} takes {bytes} bytes, but data_offsets span {end - begin}");
        }

        return new Entry(name, type, shape, count, begin, bytes);
    }

    private StoredType ReadType(string name, JsonElement tensor)
    {
        if (!tensor.TryGetProperty("dtype", out JsonElement value))
        {
            throw Fault(name, "dtype is missing");
        }

        if (value.ValueKind != JsonValueKind.String)
        {
            throw Fault(name, $"dtype must be a string, not {JsonFields.Kind(value)}");
        }

        return StoredTypes.TryParse(value.GetString()!, out StoredType type)
            ? type
            : throw Fault(name, $"dtype {JsonFile.Quote(value.GetString()!)} is not known; known are {StoredTypes.Names}");
    }

    private long[] ReadIntegers(string name, JsonElement tensor, string field, int lengthMax)
    {
        if (!tensor.TryGetProperty(field, out JsonElement value))
        {
            throw Fault(name, $"{field} is missing");
        }

        if (value.ValueKind != JsonValueKind.Array)
        {
            throw Fault(name, $"{field} must be a list, not {JsonFields.Kind(value)}");
        }

        if (value.GetArrayLength() > lengthMax)
        {
            throw Fault(name, $"{field} has {value.GetArrayLength()} numbers; at most {lengthMax} are read");
        }

        var numbers = new long[value.GetArrayLength()];
        int i = 0;
        foreach (JsonElement item in value.EnumerateArray())
        {
            if (item.ValueKind != JsonValueKind.Number || !item.TryGetInt64(out numbers[i]) || numbers[i] < 0)
            {
                throw Fault(name, $"{field}[{i}] must be a non-negative 64-bit integer");
            }

            i++;
        }

        return numbers;
    }

    private void CheckTiling(long dataBytes)
    {
        long expected = 0;
        foreach (Entry tensor in Tensors.OrderBy(tensor => tensor.Begin).ThenBy(tensor => tensor.Bytes))
        {
            if (tensor.Begin != expected)
            {
                throw Fault(tensor.Name, tensor.Begin < expected
                    ? $"overlaps the tensor before it: begins at {tensor.Begin}, but that ends at {expected}"
                    : $"leaves a hole: begins at {tensor.Begin}, but the data before it ends at {expected}");
            }

            expected = tensor.Begin + tensor.Bytes;
        }

        if (expected != dataBytes)
        {
            throw new InvalidFileException(_file, "header", $"covers {expected} data bytes, but {dataBytes} follow it");
        }
    }

    private InvalidFileException Fault(string tensor, string fault) => new(_file, tensor, fault);

    /// <summary>One tensor: its bytes lie at [Begin, Begin + Bytes) of the data after the header.</summary>
    internal sealed record Entry(string Name, StoredType Type, long[] Shape, long Count, long Begin, long Bytes);
}
