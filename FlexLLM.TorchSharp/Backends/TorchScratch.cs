namespace FlexLLM.Backends.Torch;

/// <summary>
/// Room that libtorch's temporaries need for calls within limits. One operation runs at a time and returns its temporaries at its end,
/// so it is what the greediest one needs; each states its own beside its code.
/// </summary>
internal static class TorchScratch
{
    // Rounding by libtorch's allocators, which take from the system by the 2 and 20 MiB on a GPU, and what its products work in: half a
    // MiB on the host in libtorch 1.13 and 2 MiB in 2.6, and of cuBLAS 32 MiB a thread on the GPUs where it takes most, of which two
    // compute: the one that loads, and the engine's own. Not measured on a GPU.
    private const long HostLibraryBytes = 3L << 20;
    private const long GpuLibraryBytes = 104L << 20;

    public static long BytesOf(TorchContext context, in ScratchLimits limits)
    {
        (long rows, long hidden, bool trains) = (limits.Rows, limits.HiddenColumns, limits.Trains);
        long narrowest = Math.Max(hidden, (long)limits.QueryHeads * limits.HeadDim);
        long widest = Math.Max(limits.InputColumnsMax, narrowest);
        long bytes = LinearOps.GatherBytes(rows, hidden);
        bytes = Math.Max(
            bytes, LinearOps.ScratchBytes(context, rows, widest, narrowest) + LinearOps.WideBytes(context, rows, widest, narrowest));
        bytes = Math.Max(bytes, ElementwiseOps.ScratchBytes(context, rows, widest, trains));
        bytes = Math.Max(bytes, RowOps.NormBytes(context, rows, widest, limits.QueryHeads, trains));
        bytes = Math.Max(bytes, RowOps.RopeBytes(context, rows, widest));
        bytes = Math.Max(bytes, ColumnOps.ScratchBytes(context, rows, widest, trains));
        bytes = Math.Max(bytes, FactorOps.ScratchBytes(context, rows, limits.RankMax, widest, trains));
        bytes = Math.Max(bytes, FactorOps.TogetherBytes(context, Math.Min(rows, limits.Segments), limits.RankMax, widest));
        bytes = Math.Max(bytes, AttentionOps.ScratchBytes(context, limits));
        bytes = Math.Max(bytes, LossOps.LogitsBytes(context, limits.SampledRows, limits.Vocabulary, hidden));
        bytes = Math.Max(bytes, LargestOps.ScratchBytes(context, limits.SampledRows, limits.Vocabulary));
        if (trains)
        {
            bytes = Math.Max(bytes, AttentionGradient.ScratchBytes(context, limits));
            bytes = Math.Max(bytes, LossOps.CrossEntropyBytes(context, rows, limits.Vocabulary, hidden));
            bytes = Math.Max(bytes, PackOps.ScratchBytes(context, rows, checked((int)Math.Max(limits.InnerMax, widest))));
            bytes = Math.Max(bytes, OptimizerOps.ScratchBytes(limits.InnerMax * widest));
        }

        long indices = KeptIndices.BytesMax(limits);
        long kept = RowOps.AnglesBytes(rows, limits.HeadDim) + LinearOps.RoundedBytes(context, rows, widest);
        return bytes + indices + kept + (context.OnHost ? HostLibraryBytes : GpuLibraryBytes);
    }
}
