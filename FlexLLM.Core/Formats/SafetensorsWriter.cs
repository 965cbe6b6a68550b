using System.Buffers;
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Text.Json;

namespace FlexLLM.Formats;

/// <summary>A tensor to be written, and a callback that writes exactly its bytes: row-major, little-endian.</summary>
internal sealed record TensorToWrite(string Name, StoredType Type, long[] Shape, Action<Stream> WriteData)
{
    /// <summary>Bytes of the data.</summary>
    public long Bytes { get; } = checked(Shape.Aggregate(1L, (count, size) => checked(count * size)) * StoredTypes.BytesOf(Type));

    /// <summary>A tensor whose bytes are in memory.</summary>
    public static TensorToWrite FromBytes(string name, StoredType type, long[] shape, ReadOnlyMemory<byte> data) =>
        new(name, type, shape, stream => stream.Write(data.Span));

    /// <summary>An F32 tensor whose values are in memory.</summary>
    public static TensorToWrite FromFloats(string name, long[] shape, ReadOnlyMemory<float> data) =>
        new(name, StoredType.F32, shape, stream => stream.Write(MemoryMarshal.AsBytes(data.Span)));
}

/// <summary>
/// Writes safetensors files tensor by tensor, never a whole file in memory. Wide element types come first, so that each tensor
/// is aligned to its element size; a file appears under its name only when it is complete.
/// </summary>
internal static class SafetensorsWriter
{
    // transformers refuses files that do not say this.
    private static readonly Dictionary<string, string> DefaultMetadata = new() { ["format"] = "pt" };

    /// <summary>Writes one file. Without metadata it says {"format": "pt"}, which transformers asks for.</summary>
    /// <exception cref="ArgumentException">A name repeats, a shape is negative, or a callback wrote a wrong length.</exception>
    public static void Write(
        string path, IEnumerable<TensorToWrite> tensors, IReadOnlyDictionary<string, string>? metadata = null)
    {
        TensorToWrite[] sorted = Sort(tensors);
        byte[] header = Header(sorted, metadata ?? DefaultMetadata);
        AtomicFile.Write(path, stream =>
        {
            stream.Write(header);
            foreach (TensorToWrite tensor in sorted)
            {
                long begin = stream.Position;
                tensor.WriteData(stream);
                long written = stream.Position - begin;
                if (written != tensor.Bytes)
                {
                    throw new ArgumentException(
                        $"The callback of '{tensor.Name}' wrote {written} bytes instead of {tensor.Bytes}.", nameof(tensors));
                }
            }
        });
    }

    /// <summary>
    /// Writes model-00001-of-0000N.safetensors ... and model.safetensors.index.json as transformers does, filling shards in the
    /// given order; a tensor above the limit gets a shard of its own, and what fits one shard becomes model.safetensors.
    /// </summary>
    /// <exception cref="IOException">The folder holds a checkpoint of the other form, which could be read instead.</exception>
    public static void WriteSharded(string folder, IEnumerable<TensorToWrite> tensors, long maxShardBytes)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(maxShardBytes, 1);
        TensorToWrite[] all = [.. tensors];
        CheckNames(all);
        List<List<TensorToWrite>> shards = Split(all, maxShardBytes);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(shards.Count, SafetensorsCheckpoint.ShardsMax, nameof(maxShardBytes));
        Directory.CreateDirectory(folder);
        string single = Path.Combine(folder, SafetensorsCheckpoint.SingleFileName);
        string index = Path.Combine(folder, SafetensorsCheckpoint.IndexFileName);
        string other = shards.Count == 1 ? index : single;
        if (File.Exists(other))
        {
            throw new IOException($"{other} exists; remove that checkpoint before writing another form of it.");
        }

        if (shards.Count == 1)
        {
            Write(single, all);
            return;
        }

        for (int i = 0; i < shards.Count; i++)
        {
            Write(Path.Combine(folder, ShardName(i, shards.Count)), shards[i]);
        }

        AtomicFile.WriteJson(index, json => WriteIndex(json, shards));
    }

    private static string ShardName(int index, int count) => $"model-{index + 1:D5}-of-{count:D5}.safetensors";

    private static List<List<TensorToWrite>> Split(TensorToWrite[] tensors, long maxShardBytes)
    {
        var shards = new List<List<TensorToWrite>> { new() };
        long bytes = 0;
        foreach (TensorToWrite tensor in tensors)
        {
            if (shards[^1].Count > 0 && tensor.Bytes > maxShardBytes - bytes)
            {
                shards.Add([]);
                bytes = 0;
            }

            shards[^1].Add(tensor);
            bytes += tensor.Bytes;
        }

        return shards;
    }

    private static void WriteIndex(Utf8JsonWriter json, List<List<TensorToWrite>> shards)
    {
        json.WriteStartObject();
        json.WriteStartObject("metadata");
        json.WriteNumber("total_size", shards.Sum(shard => shard.Sum(tensor => tensor.Bytes)));
        json.WriteEndObject();
        json.WriteStartObject("weight_map");
        for (int i = 0; i < shards.Count; i++)
        {
            foreach (TensorToWrite tensor in shards[i])
            {
                json.WriteString(tensor.Name, ShardName(i, shards.Count));
            }
        }

        json.WriteEndObject();
        json.WriteEndObject();
    }

    private static TensorToWrite[] Sort(IEnumerable<TensorToWrite> tensors)
    {
        TensorToWrite[] sorted =
        [
            .. tensors.OrderByDescending(tensor => StoredTypes.BytesOf(tensor.Type))
                .ThenBy(tensor => tensor.Name, StringComparer.Ordinal),
        ];
        CheckNames(sorted);
        return sorted;
    }

    private static void CheckNames(TensorToWrite[] tensors)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan(tensors.Length, SafetensorsHeader.TensorsMax, nameof(tensors));
        var names = new HashSet<string> { SafetensorsHeader.MetadataKey };
        foreach (TensorToWrite tensor in tensors)
        {
            if (!names.Add(tensor.Name))
            {
                throw new ArgumentException($"Tensor name '{tensor.Name}' repeats or is reserved.", nameof(tensors));
            }

            if (tensor.Shape.Length > SafetensorsHeader.RankMax || tensor.Shape.Any(size => size < 0))
            {
                throw new ArgumentException(
                    $"Tensor '{tensor.Name}' has shape [{string.Join(", ", tensor.Shape)}].", nameof(tensors));
            }
        }
    }

    // Eight bytes of length, then JSON padded with spaces so that the data begins at a multiple of eight.
    private static byte[] Header(TensorToWrite[] tensors, IReadOnlyDictionary<string, string> metadata)
    {
        var buffer = new ArrayBufferWriter<byte>();
        BinaryPrimitives.WriteUInt64LittleEndian(buffer.GetSpan(8), 0);
        buffer.Advance(8);
        using (var json = new Utf8JsonWriter(buffer))
        {
            WriteHeader(json, tensors, metadata);
        }

        int padding = -buffer.WrittenCount & 7;
        buffer.Write("        "u8[..padding]);
        byte[] header = buffer.WrittenSpan.ToArray();
        if (header.Length - 8 > SafetensorsHeader.BytesMax)
        {
            throw new ArgumentException($"The header would have {header.Length} bytes.", nameof(tensors));
        }

        BinaryPrimitives.WriteUInt64LittleEndian(header, (ulong)(header.Length - 8));
        return header;
    }

    private static void WriteHeader(Utf8JsonWriter json, TensorToWrite[] tensors, IReadOnlyDictionary<string, string> metadata)
    {
        json.WriteStartObject();
        json.WriteStartObject(SafetensorsHeader.MetadataKey);
        foreach ((string key, string value) in metadata)
        {
            json.WriteString(key, value);
        }

        json.WriteEndObject();
        long begin = 0;
        foreach (TensorToWrite tensor in tensors)
        {
            json.WriteStartObject(tensor.Name);
            json.WriteString("dtype", StoredTypes.NameOf(tensor.Type));
            json.WriteStartArray("shape");
            foreach (long size in tensor.Shape)
            {
                json.WriteNumberValue(size);
            }

            json.WriteEndArray();
            json.WriteStartArray("data_offsets");
            json.WriteNumberValue(begin);
            json.WriteNumberValue(begin += tensor.Bytes);
            json.WriteEndArray();
            json.WriteEndObject();
        }

        json.WriteEndObject();
    }
}
