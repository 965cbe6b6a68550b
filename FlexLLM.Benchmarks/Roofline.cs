using System.Text.Json;
using FlexLLM.Benchmarks.Serving;

namespace FlexLLM.Benchmarks;

/// <summary>
/// The most that a device did when it did nothing else. What a verb measures is given as a share of it: what reads much by the copy
/// bandwidth, what multiplies much by the matrix rate.
/// </summary>
/// <param name="CopyBytesPerSecond">Bytes read and written, together, by a copy that is larger than every cache.</param>
/// <param name="F32FlopsPerSecond">Multiplications and additions of a product of F32 matrices.</param>
/// <param name="BF16FlopsPerSecond">The same where the weights are BF16, and the device multiplies as it does for such weights.</param>
internal sealed record Roofline(double CopyBytesPerSecond, double F32FlopsPerSecond, double BF16FlopsPerSecond)
{
    /// <summary>Share of the copy bandwidth that so many bytes in so many seconds are.</summary>
    public double ShareOfCopy(double bytes, double seconds) => bytes / seconds / CopyBytesPerSecond;

    /// <summary>Share of the matrix rate that so many operations in so many seconds are.</summary>
    public double ShareOfMatrix(double flops, double seconds, DType weights) => flops / seconds / MatrixFlopsPerSecond(weights);

    /// <summary>Matrix rate for weights of that type.</summary>
    public double MatrixFlopsPerSecond(DType weights) => weights == DType.BF16 ? BF16FlopsPerSecond : F32FlopsPerSecond;

    /// <summary>One line.</summary>
    public string Describe() =>
        $"copy {(CopyBytesPerSecond / 1e9).Fixed(1)} GB/s, matrix {(F32FlopsPerSecond / 1e9).Fixed(1)} GFLOP/s F32, " +
        $"{(BF16FlopsPerSecond / 1e9).Fixed(1)} GFLOP/s BF16";

    /// <summary>Writes "roofline": { ... }.</summary>
    public void Write(Utf8JsonWriter json)
    {
        json.WriteStartObject("roofline");
        json.WriteNumber("copy_bytes_per_second", CopyBytesPerSecond);
        json.WriteNumber("f32_flops_per_second", F32FlopsPerSecond);
        json.WriteNumber("bf16_flops_per_second", BF16FlopsPerSecond);
        json.WriteEndObject();
    }
}
