using System.Runtime.InteropServices;
using FlexLLM.Formats;

namespace FlexLLM.Tests.Support;

/// <summary>Reads and changes tensors of safetensors files.</summary>
internal static class Weights
{
    /// <summary>Rewrites an F32 tensor of a file, value by value.</summary>
    public static void Change(string path, string tensor, Func<float, float> change)
    {
        Dictionary<string, (long[] Shape, float[] Values)> tensors = Read(path);
        float[] values = tensors[tensor].Values;
        for (int i = 0; i < values.Length; i++)
        {
            values[i] = change(values[i]);
        }

        SafetensorsWriter.Write(path, [.. tensors.Select(t => TensorToWrite.FromFloats(t.Key, t.Value.Shape, t.Value.Values))]);
    }

    /// <summary>All tensors of an F32 file.</summary>
    public static Dictionary<string, (long[] Shape, float[] Values)> Read(string path)
    {
        using SafetensorsFile file = SafetensorsFile.Open(path);
        return file.Tensors.Values.ToDictionary(t => t.Name, t => ((long[])[.. t.Shape], t.ToFloats()));
    }

    /// <summary>The bits of all tensors by name.</summary>
    public static Dictionary<string, byte[]> BitsOf(string path) =>
        Read(path).ToDictionary(t => t.Key, t => MemoryMarshal.AsBytes(t.Value.Values.AsSpan()).ToArray());
}
