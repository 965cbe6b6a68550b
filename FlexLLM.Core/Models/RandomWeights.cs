using System.Runtime.InteropServices;
using FlexLLM.Primitives;

namespace FlexLLM.Models;

/// <summary>
/// Weights of a shape that come from no file: for benchmarks, where a checkpoint would take longer to write than to measure. All
/// matrices lie over each other in one block of host memory as large as the largest of them, each from a place of its own.
/// Norm gains are 1, everything else is about normal.
/// </summary>
internal sealed unsafe class RandomWeights : IDisposable
{
    // Prime, so that no two rows of a matrix are equal where the block repeats itself.
    private const int Period = 16_777_213;
    private const int ValuesPerChunk = 1 << 16;
    private const int PlacesMax = 1 << 20;

    private readonly long _places;
    private byte* _values;

    /// <param name="config">Shape of the model.</param>
    /// <param name="type">F32 or BF16.</param>
    /// <param name="seed">Seed of all weights.</param>
    /// <param name="deviation">Standard deviation of the weights.</param>
    public RandomWeights(ModelConfig config, DType type, ulong seed, float deviation = RandomCheckpoint.DeviationDefault)
    {
        Check.That(type is DType.F32 or DType.BF16);
        (Config, Type) = (config, type);
        long largest = DecoderWeights.Of(config).Max(shape => shape.Count);
        _places = Math.Min(largest, PlacesMax);
        long count = largest + _places;
        _values = (byte*)NativeMemory.Alloc((nuint)count, (nuint)DTypes.BytesOf(type));
        Fill(count, seed, deviation);
    }

    /// <summary>Shape of the model.</summary>
    public ModelConfig Config { get; }

    /// <summary>How matrices are stored, here and on the device.</summary>
    public DType Type { get; }

    /// <summary>A matrix; valid until this is disposed.</summary>
    public HostMatrix Matrix(WeightShape shape)
    {
        Check.That(_values is not null && !shape.IsVector);
        long place = (long)(StableHash.Of(MemoryMarshal.AsBytes(shape.Name.AsSpan())) % (ulong)_places);
        return new HostMatrix(_values + (place * DTypes.BytesOf(Type)), Type, shape.Rows, shape.Columns);
    }

    /// <summary>A gain or a bias.</summary>
    public float[] Vector(WeightShape shape)
    {
        Check.That(_values is not null && shape.IsVector);
        float[] values = new float[shape.Columns];
        if (RandomCheckpoint.IsGain(shape))
        {
            Array.Fill(values, 1f);
            return values;
        }

        HostMatrix source = Matrix(shape with { IsVector = false });
        for (int i = 0; i < values.Length; i++)
        {
            values[i] = source[0, i];
        }

        return values;
    }

    public void Dispose()
    {
        NativeMemory.Free(_values);
        _values = null;
    }

    private void Fill(long count, ulong seed, float deviation)
    {
        var random = new SeededRandom(seed);
        float[] values = new float[ValuesPerChunk];
        ushort[] narrow = new ushort[ValuesPerChunk];
        int bytes = DTypes.BytesOf(Type);
        long drawn = Math.Min(count, Period);
        for (long at = 0; at < drawn; at += ValuesPerChunk)
        {
            Span<float> chunk = values.AsSpan(0, (int)Math.Min(ValuesPerChunk, drawn - at));
            RandomCheckpoint.FillNormal(chunk, deviation, ref random);
            ReadOnlySpan<byte> stored = Type == DType.F32 ? MemoryMarshal.AsBytes(chunk) : RandomCheckpoint.Narrow(chunk, narrow);
            stored.CopyTo(new Span<byte>(_values + (at * bytes), stored.Length));
        }

        for (long at = drawn; at < count; at += drawn)
        {
            long length = Math.Min(drawn, count - at) * bytes;
            Buffer.MemoryCopy(_values, _values + (at * bytes), length, length);
        }
    }
}
