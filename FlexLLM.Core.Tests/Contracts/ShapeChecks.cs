using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>A wrong shape is a broken invariant, never a silent result.</summary>
internal static class ShapeChecks
{
    private static readonly HeadShape Heads = new(KvHeads: 2, Group: 2, HeadDim: 4);

    private static readonly Dictionary<string, Action<Workbench>> Mistakes = new()
    {
        ["Upload_TooShort"] = b => b.Backend.Upload(new float[11], T(b, 3, 4)),
        ["Upload_TooLong"] = b => b.Backend.Upload(new float[13], T(b, 3, 4)),
        ["Download_TooShort"] = b => b.Backend.Download(T(b, 3, 4), new float[11]),
        ["Copy_Rows"] = b => b.Backend.Copy(T(b, 3, 4), T(b, 2, 4)),
        ["Copy_Columns"] = b => b.Backend.Copy(T(b, 3, 4), T(b, 3, 5)),
        ["Gather_Rows"] = b => b.Backend.Gather(W(b, 9, 4), [1, 2], T(b, 3, 4)),
        ["Gather_Columns"] = b => b.Backend.Gather(W(b, 9, 4), [1, 2], T(b, 2, 5)),
        ["Gather_IdTooLarge"] = b => b.Backend.Gather(W(b, 9, 4), [1, 9], T(b, 2, 4)),
        ["Gather_IdNegative"] = b => b.Backend.Gather(W(b, 9, 4), [1, -1], T(b, 2, 4)),
        ["RmsNorm_Groups"] = b => b.Backend.RmsNorm(T(b, 2, 7), T(b, 1, 3), 1e-5f, T(b, 2, 7)),
        ["RmsNorm_GainRows"] = b => b.Backend.RmsNorm(T(b, 2, 6), T(b, 2, 6), 1e-5f, T(b, 2, 6)),
        ["RmsNorm_Rows"] = b => b.Backend.RmsNorm(T(b, 2, 6), T(b, 1, 6), 1e-5f, T(b, 3, 6)),
        ["RmsNormBackward_Dy"] = b =>
            b.Backend.RmsNormBackward(T(b, 2, 6), T(b, 1, 6), 1e-5f, T(b, 2, 5), T(b, 2, 6), accumulate: false),
        ["RmsNormBackward_Dx"] = b =>
            b.Backend.RmsNormBackward(T(b, 2, 6), T(b, 1, 6), 1e-5f, T(b, 2, 6), T(b, 1, 6), accumulate: true),
        ["Linear_In"] = b => b.Backend.Linear(T(b, 2, 5), W(b, 3, 4), null, T(b, 2, 3), accumulate: false),
        ["Linear_Out"] = b => b.Backend.Linear(T(b, 2, 4), W(b, 3, 4), null, T(b, 2, 4), accumulate: false),
        ["Linear_Rows"] = b => b.Backend.Linear(T(b, 2, 4), W(b, 3, 4), null, T(b, 3, 3), accumulate: false),
        ["Linear_Bias"] = b => b.Backend.Linear(T(b, 2, 4), W(b, 3, 4), T(b, 1, 4), T(b, 2, 3), accumulate: false),
        ["LinearBackwardInput_Out"] = b => b.Backend.LinearBackwardInput(T(b, 2, 4), W(b, 3, 4), T(b, 2, 4), accumulate: false),
        ["LinearBackwardInput_Rows"] = b => b.Backend.LinearBackwardInput(T(b, 2, 3), W(b, 3, 4), T(b, 1, 4), accumulate: false),
        ["LoraBypass_In"] = b =>
            b.Backend.LoraBypass(T(b, 2, 5), [new LoraSegment(0, 2, F(b, 2, 4), F(b, 2, 3), 1)], T(b, 2, 3)),
        ["LoraBypass_Out"] = b =>
            b.Backend.LoraBypass(T(b, 2, 4), [new LoraSegment(0, 2, F(b, 2, 4), F(b, 2, 3), 1)], T(b, 2, 4)),
        ["LoraBypass_RowsBeyond"] = b =>
            b.Backend.LoraBypass(T(b, 2, 4), [new LoraSegment(1, 2, F(b, 2, 4), F(b, 2, 3), 1)], T(b, 2, 3)),
        ["LoraBypass_Ranks"] = b =>
            b.Backend.LoraBypass(T(b, 2, 4), [new LoraSegment(0, 2, F(b, 2, 4), F(b, 1, 3), 1)], T(b, 2, 3)),
        ["LoraBypassBackward_Ranks"] = b =>
            b.Backend.LoraBypassBackward(
                T(b, 2, 4), T(b, 2, 3), F(b, 2, 4), F(b, 3, 3), 1, T(b, 2, 4), T(b, 2, 3), null),
        ["LoraBypassBackward_Rows"] = b =>
            b.Backend.LoraBypassBackward(T(b, 2, 4), T(b, 3, 3), F(b, 2, 4), F(b, 2, 3), 1, T(b, 2, 4), T(b, 2, 3), null),
        ["LoraBypassBackward_GradA"] = b =>
            b.Backend.LoraBypassBackward(T(b, 2, 4), T(b, 2, 3), F(b, 2, 4), F(b, 2, 3), 1, T(b, 1, 4), T(b, 2, 3), null),
        ["LoraBypassBackward_GradB"] = b =>
            b.Backend.LoraBypassBackward(T(b, 2, 4), T(b, 2, 3), F(b, 2, 4), F(b, 2, 3), 1, T(b, 2, 4), T(b, 2, 4), null),
        ["LoraBypassBackward_Dx"] = b =>
            b.Backend.LoraBypassBackward(T(b, 2, 4), T(b, 2, 3), F(b, 2, 4), F(b, 2, 3), 1, T(b, 2, 4), T(b, 2, 3), T(b, 1, 4)),
        ["CreateFactor_Inner"] = b => F(b, 0, 4),
        ["CreateFactor_Wide"] = b => F(b, 2, 0),
        ["Narrow_Wide"] = b => b.Backend.Narrow(T(b, 2, 5), F(b, 3, 4), 1, T(b, 2, 3), accumulate: false),
        ["Narrow_Inner"] = b => b.Backend.Narrow(T(b, 2, 4), F(b, 3, 4), 1, T(b, 2, 4), accumulate: false),
        ["Narrow_Rows"] = b => b.Backend.Narrow(T(b, 2, 4), F(b, 3, 4), 1, T(b, 3, 3), accumulate: true),
        ["Widen_Inner"] = b => b.Backend.Widen(T(b, 2, 4), F(b, 3, 4), 1, T(b, 2, 4), accumulate: false),
        ["Widen_Wide"] = b => b.Backend.Widen(T(b, 2, 3), F(b, 3, 4), 1, T(b, 2, 3), accumulate: false),
        ["Widen_Rows"] = b => b.Backend.Widen(T(b, 2, 3), F(b, 3, 4), 1, T(b, 1, 4), accumulate: true),
        ["AddOuter_Rows"] = b => b.Backend.AddOuter(T(b, 2, 3), T(b, 1, 4), 1, T(b, 3, 4)),
        ["AddOuter_Inner"] = b => b.Backend.AddOuter(T(b, 2, 3), T(b, 2, 4), 1, T(b, 2, 4)),
        ["AddOuter_Wide"] = b => b.Backend.AddOuter(T(b, 2, 3), T(b, 2, 4), 1, T(b, 3, 5)),
        ["AddBias_Columns"] = b => b.Backend.AddBias(T(b, 2, 4), T(b, 1, 5)),
        ["AddBias_Rows"] = b => b.Backend.AddBias(T(b, 2, 4), T(b, 2, 4)),
        ["AddColumnSums_Columns"] = b => b.Backend.AddColumnSums(T(b, 2, 4), T(b, 1, 3)),
        ["AddColumnSums_Rows"] = b => b.Backend.AddColumnSums(T(b, 2, 4), T(b, 2, 4)),
        ["ScaleColumns_Gain"] = b => b.Backend.ScaleColumns(T(b, 2, 4), T(b, 1, 2), T(b, 2, 4), accumulate: false),
        ["ScaleColumns_GainRows"] = b => b.Backend.ScaleColumns(T(b, 2, 4), T(b, 2, 4), T(b, 2, 4), accumulate: false),
        ["ScaleColumns_Rows"] = b => b.Backend.ScaleColumns(T(b, 2, 4), T(b, 1, 4), T(b, 3, 4), accumulate: true),
        ["ScaleColumnsBackward_Dy"] = b =>
            b.Backend.ScaleColumnsBackward(T(b, 2, 4), T(b, 2, 5), T(b, 1, 4), T(b, 1, 4), null, accumulate: false),
        ["ScaleColumnsBackward_GradGain"] = b =>
            b.Backend.ScaleColumnsBackward(T(b, 2, 4), T(b, 2, 4), T(b, 1, 4), T(b, 1, 5), null, accumulate: false),
        ["ScaleColumnsBackward_Gain"] = b =>
            b.Backend.ScaleColumnsBackward(T(b, 2, 4), T(b, 2, 4), T(b, 2, 4), T(b, 1, 4), T(b, 2, 4), accumulate: false),
        ["ScaleColumnsBackward_Dx"] = b =>
            b.Backend.ScaleColumnsBackward(T(b, 2, 4), T(b, 2, 4), T(b, 1, 4), T(b, 1, 4), T(b, 1, 4), accumulate: true),
        ["CopyColumns_Rows"] = b => b.Backend.CopyColumns(T(b, 2, 4), 0, T(b, 3, 4), 0, 2),
        ["CopyColumns_SourceEnd"] = b => b.Backend.CopyColumns(T(b, 2, 4), 2, T(b, 2, 9), 0, 3),
        ["CopyColumns_DestinationEnd"] = b => b.Backend.CopyColumns(T(b, 2, 9), 0, T(b, 2, 4), 2, 3),
        ["CopyColumns_SourceStart"] = b => b.Backend.CopyColumns(T(b, 2, 4), -1, T(b, 2, 4), 0, 2),
        ["CopyColumns_DestinationStart"] = b => b.Backend.CopyColumns(T(b, 2, 4), 0, T(b, 2, 4), -1, 2),
        ["CopyColumns_Count"] = b => b.Backend.CopyColumns(T(b, 2, 4), 1, T(b, 2, 4), 1, -1),
        ["Relu_Rows"] = b => b.Backend.Relu(T(b, 2, 4), T(b, 1, 4)),
        ["ReluBackward_Dy"] = b => b.Backend.ReluBackward(T(b, 2, 4), T(b, 2, 5), T(b, 2, 4)),
        ["ReluBackward_Dx"] = b => b.Backend.ReluBackward(T(b, 2, 4), T(b, 2, 4), T(b, 3, 4)),
        ["Silu_Columns"] = b => b.Backend.Silu(T(b, 2, 4), T(b, 2, 5)),
        ["SiluBackward_Dy"] = b => b.Backend.SiluBackward(T(b, 2, 4), T(b, 1, 4), T(b, 2, 4)),
        ["SiluBackward_Dx"] = b => b.Backend.SiluBackward(T(b, 2, 4), T(b, 2, 4), T(b, 2, 3)),
        ["Pack_Rows"] = b => b.Backend.Pack(T(b, 2, 33), PackedFormat.BF16, T(b, 3, 17)),
        ["Pack_BF16Columns"] = b => b.Backend.Pack(T(b, 2, 33), PackedFormat.BF16, T(b, 2, 16)),
        ["Pack_SignColumns"] = b => b.Backend.Pack(T(b, 2, 33), PackedFormat.SignBits, T(b, 2, 1)),
        ["Unpack_Rows"] = b => b.Backend.Unpack(T(b, 2, 2), PackedFormat.SignBits, T(b, 1, 33)),
        ["Unpack_BF16Columns"] = b => b.Backend.Unpack(T(b, 2, 18), PackedFormat.BF16, T(b, 2, 34)),
        ["Unpack_SignColumns"] = b => b.Backend.Unpack(T(b, 2, 17), PackedFormat.SignBits, T(b, 2, 33)),
        ["Rope_Positions"] = b => b.Backend.Rope(T(b, 2, 8), [0], T(b, 5, 4), inverse: false),
        ["Rope_PositionTooLarge"] = b => b.Backend.Rope(T(b, 2, 8), [0, 5], T(b, 5, 4), inverse: false),
        ["Rope_Columns"] = b => b.Backend.Rope(T(b, 2, 7), [0, 1], T(b, 5, 4), inverse: false),
        ["AppendKv_Columns"] = b => b.Backend.AppendKv(T(b, 2, 9), T(b, 2, 9), 0, [Segment(b, 2)]),
        ["AppendKv_RowsBeyond"] = b => b.Backend.AppendKv(T(b, 2, 8), T(b, 2, 8), 0, [Segment(b, 3)]),
        ["AppendKv_Layer"] = b => b.Backend.AppendKv(T(b, 2, 8), T(b, 2, 8), 2, [Segment(b, 2)]),
        ["AppendKv_TableTooShort"] = b => b.Backend.AppendKv(T(b, 17, 8), T(b, 17, 8), 0, [Segment(b, 17)]),
        ["AppendKv_BlockTooLarge"] = b =>
            b.Backend.AppendKv(T(b, 2, 8), T(b, 2, 8), 0, [Segment(b, 2) with { BlockTable = [3] }]),
        ["Attention_Columns"] = b => b.Backend.Attention(T(b, 2, 12), T(b, 2, 12), 0, [Segment(b, 2)]),
        ["Attention_Output"] = b => b.Backend.Attention(T(b, 2, 16), T(b, 2, 8), 0, [Segment(b, 2)]),
        ["Attention_RowsBeyond"] = b => b.Backend.Attention(T(b, 2, 16), T(b, 2, 16), 0, [Segment(b, 3)]),
        ["Attention_TableTooShort"] = b => b.Backend.Attention(T(b, 17, 16), T(b, 17, 16), 0, [Segment(b, 17)]),
        ["Attention_LogSumExp"] = b =>
            b.Backend.Attention(T(b, 2, 16), T(b, 2, 16), 0, [Segment(b, 2) with { LogSumExp = T(b, 1, 4) }]),
        ["AttentionBackward_Rows"] = b => Backward(b, T(b, 3, 16), T(b, 3, 16), T(b, 3, 16), T(b, 2, 8), T(b, 2, 8)),
        ["AttentionBackward_DO"] = b => Backward(b, T(b, 2, 16), T(b, 2, 8), T(b, 2, 16), T(b, 2, 8), T(b, 2, 8)),
        ["AttentionBackward_DQ"] = b => Backward(b, T(b, 2, 16), T(b, 2, 16), T(b, 2, 8), T(b, 2, 8), T(b, 2, 8)),
        ["AttentionBackward_DK"] = b => Backward(b, T(b, 2, 16), T(b, 2, 16), T(b, 2, 16), T(b, 1, 8), T(b, 2, 8)),
        ["AttentionBackward_DV"] = b => Backward(b, T(b, 2, 16), T(b, 2, 16), T(b, 2, 16), T(b, 2, 8), T(b, 2, 16)),
        ["SiluGate_Columns"] = b => b.Backend.SiluGate(T(b, 2, 4), T(b, 2, 5), T(b, 2, 4)),
        ["SiluGate_Rows"] = b => b.Backend.SiluGate(T(b, 2, 4), T(b, 2, 4), T(b, 3, 4)),
        ["SiluGateBackward_Dy"] = b =>
            b.Backend.SiluGateBackward(T(b, 2, 4), T(b, 2, 4), T(b, 1, 4), T(b, 2, 4), T(b, 2, 4)),
        ["SiluGateBackward_DUp"] = b =>
            b.Backend.SiluGateBackward(T(b, 2, 4), T(b, 2, 4), T(b, 2, 4), T(b, 2, 4), T(b, 2, 3)),
        ["Add_Rows"] = b => b.Backend.Add(T(b, 2, 4), T(b, 1, 4), T(b, 2, 4)),
        ["Add_Columns"] = b => b.Backend.Add(T(b, 2, 4), T(b, 2, 4), T(b, 2, 5)),
        ["Logits_Rows"] = b => b.Backend.Logits(T(b, 5, 4), [1, 2], W(b, 9, 4), T(b, 3, 9)),
        ["Logits_RowTooLarge"] = b => b.Backend.Logits(T(b, 5, 4), [1, 5], W(b, 9, 4), T(b, 2, 9)),
        ["Logits_Hidden"] = b => b.Backend.Logits(T(b, 5, 3), [1, 2], W(b, 9, 4), T(b, 2, 9)),
        ["CrossEntropy_Targets"] = b =>
            b.Backend.FusedLinearCrossEntropy(T(b, 2, 4), [1], W(b, 9, 4), 1, T(b, 2, 4), T(b, 2, 1)),
        ["CrossEntropy_TargetTooLarge"] = b =>
            b.Backend.FusedLinearCrossEntropy(T(b, 2, 4), [1, 9], W(b, 9, 4), 1, T(b, 2, 4), T(b, 2, 1)),
        ["CrossEntropy_Losses"] = b =>
            b.Backend.FusedLinearCrossEntropy(T(b, 2, 4), [1, 2], W(b, 9, 4), 1, T(b, 2, 4), T(b, 1, 1)),
        ["CrossEntropy_LossColumns"] = b =>
            b.Backend.FusedLinearCrossEntropy(T(b, 2, 4), [1, 2], W(b, 9, 4), 1, T(b, 2, 4), T(b, 2, 2)),
        ["CrossEntropy_Dx"] = b =>
            b.Backend.FusedLinearCrossEntropy(T(b, 2, 4), [1, 2], W(b, 9, 4), 1, T(b, 2, 5), T(b, 2, 1)),
        ["SgdStep_Gradient"] = b => b.Backend.SgdStep(T(b, 2, 4), T(b, 2, 5), null, new SgdStepOptions(1, 0, false, 0)),
        ["SgdStep_Velocity"] = b =>
            b.Backend.SgdStep(T(b, 2, 4), T(b, 2, 4), T(b, 1, 4), new SgdStepOptions(1, 0.5f, false, 0)),
        ["AdamWStep_Moment"] = b =>
            b.Backend.AdamWStep(T(b, 2, 4), T(b, 2, 4), T(b, 2, 4), T(b, 2, 3), new AdamWStepOptions(1, 0, 0, 1, 0, 1)),
    };

    public static IEnumerable<string> Names => Mistakes.Keys;

    public static void Throws(IComputeBackend backend, string mistake)
    {
        using var bench = new Workbench(backend);
        Assert.Throws<UnreachableException>(() =>
        {
            Mistakes[mistake](bench);
            backend.Synchronize(); // A device may run ahead.
        });
    }

    private static DeviceTensor T(Workbench bench, int rows, int columns) => bench.Own(bench.Backend.Allocate(rows, columns));

    private static DeviceWeight W(Workbench bench, int outFeatures, int inFeatures) =>
        bench.RandomWeight(outFeatures, inFeatures, DType.F32).Weight;

    private static DeviceFactor F(Workbench bench, int inner, int wide) =>
        bench.Own(bench.Backend.CreateFactor(inner, wide));

    // 2 layers of 3 blocks, one block in the table: 16 positions.
    private static AttentionSegment Segment(Workbench bench, int count)
    {
        DeviceKvCache cache = bench.Own(bench.Backend.CreateKvCache(2, 3, Heads.KvHeads, Heads.HeadDim));
        return new AttentionSegment(0, count, 0, cache, [1]);
    }

    private static void Backward(
        Workbench bench, DeviceTensor q, DeviceTensor dO, DeviceTensor dQ, DeviceTensor dK, DeviceTensor dV)
    {
        AttentionSegment window = Segment(bench, 2) with { LogSumExp = T(bench, 2, Heads.QueryHeads) };
        bench.Backend.AttentionBackward(q, dO, 0, window, dQ, dK, dV);
    }
}
