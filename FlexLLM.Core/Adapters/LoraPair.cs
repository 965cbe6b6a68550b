using FlexLLM.Backends;

namespace FlexLLM.Adapters;

/// <summary>
/// The LoRA weights of one site: y += scale * (x A^T) B^T. A is [rank, in] as PEFT stores lora_A; B is held transposed, [rank,
/// out]. Who created the factors frees them.
/// </summary>
internal sealed record LoraPair(DeviceFactor A, DeviceFactor BTransposed)
{
    public int Rank => A.Inner;

    public int InFeatures => A.Wide;

    public int OutFeatures => BTransposed.Wide;

    public long Bytes => A.Bytes + BTransposed.Bytes;

    /// <summary>After A or B was written.</summary>
    public void Refresh(IComputeBackend backend)
    {
        backend.RefreshFactor(A);
        backend.RefreshFactor(BTransposed);
    }
}
