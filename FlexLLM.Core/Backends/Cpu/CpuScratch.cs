namespace FlexLLM.Backends.Cpu;

/// <summary>
/// What each slot of the workspace needs for calls within limits. The formulas are those of the operations: each states
/// once, beside its kernel, how much it takes.
/// </summary>
internal static class CpuScratch
{
    /// <summary>Bytes by slot.</summary>
    public static long[] BytesOf(in ScratchLimits limits, int threads)
    {
        long[] bytes = new long[Workspace.SlotCount];
        int valueColumns = CpuKvCache.ValueColumnsOf(limits.HeadDim);
        int blocks = PanelPacking.Count(limits.Positions);
        Ask(WorkspaceSlot.BlockTables, AttentionForward.TableBytes(limits.Segments * (long)blocks));
        Ask(WorkspaceSlot.AttentionSegments, AttentionForward.SegmentBytes(limits.Segments));
        AskFloats(WorkspaceSlot.AttentionScratch, threads * AttentionForward.TileFloats(limits.Positions, valueColumns));
        Ask(WorkspaceSlot.LoraPieces, LoraOps.PieceBytes(LoraOps.PiecesMax(limits.Rows, limits.Segments)));
        AskFloats(WorkspaceSlot.LowRank, LoraOps.LowRankFloats(limits.Rows, limits.RankMax));
        AskFloats(WorkspaceSlot.FactorRows, threads * FactorOps.ScratchFloats(limits.InnerMax));
        AskFloats(WorkspaceSlot.FactorTiles, threads * FactorOps.TileFloats(limits.InnerMax));
        AskFloats(WorkspaceSlot.SelectedRows, CrossEntropyOp.SelectedFloats(limits.SampledRows, limits.HiddenColumns));
        if (!limits.Trains)
        {
            return bytes;
        }

        int group = limits.QueryHeads / limits.KvHeads;
        AskFloats(WorkspaceSlot.AttentionScratch, threads * AttentionBackward.TileFloats(valueColumns));
        AskFloats(WorkspaceSlot.AttentionHead, AttentionBackward.HeadFloats(limits.Positions, valueColumns));
        AskFloats(
            WorkspaceSlot.AttentionChunk, AttentionBackward.ChunkFloats(limits.Rows, group, limits.Positions, valueColumns));
        Ask(WorkspaceSlot.LoraPieces, LoraOps.PieceBytes(2 * LoraOps.PiecesMax(limits.Rows, segments: 1)));
        AskFloats(WorkspaceSlot.LowRank, 2 * LoraOps.LowRankFloats(limits.Rows, limits.RankMax));
        int chunk = CrossEntropyOp.ChunkRows(limits.Rows);
        AskFloats(WorkspaceSlot.SelectedRows, CrossEntropyOp.SelectedFloats(chunk, limits.HiddenColumns));
        AskFloats(WorkspaceSlot.SelectedGradients, CrossEntropyOp.SelectedFloats(chunk, limits.HiddenColumns));
        AskFloats(WorkspaceSlot.Logits, CrossEntropyOp.SelectedFloats(chunk, limits.Vocabulary));
        Ask(WorkspaceSlot.RowLosses, CrossEntropyOp.LossBytes(chunk));
        return bytes;

        void Ask(WorkspaceSlot slot, long count) => bytes[(int)slot] = Math.Max(bytes[(int)slot], count);

        void AskFloats(WorkspaceSlot slot, long count) => Ask(slot, count * sizeof(float));
    }
}
