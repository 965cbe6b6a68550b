using FlexLLM.Backends;
using FlexLLM.Backends.Torch;
using FlexLLM.Primitives;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>
/// No operation holds more temporaries than its formula says, what libtorch makes by itself included: the most that it takes from malloc
/// at once.
/// </summary>
[TorchFixture]
[NonParallelizable]
internal sealed class TorchScratchTests
{
    // The plan adds as much, once, to the largest of the formulas.
    private const long LibraryBytes = 3L << 20;

    /// <summary>The largest calls that are measured.</summary>
    public static readonly ScratchLimits Limits = new()
    {
        Rows = 512,
        Segments = 32,
        Positions = 2048,
        SampledRows = 32,
        HiddenColumns = 2048,
        Vocabulary = 8000,
        InputColumnsMax = 8192,
        QueryHeads = 16,
        KvHeads = 4,
        HeadDim = 64,
        RankMax = 64,
        InnerMax = 64,
        Trains = true,
    };

    private Workbench _bench = null!;
    private TorchComputeBackend _backend = null!;
    private TorchContext _context = null!;

    [SetUp]
    public void SetUp()
    {
        MallocPeak.Prepare();
        Open(DType.F32, DType.F32);
    }

    [TearDown]
    public void TearDown()
    {
        _bench.Dispose();
        _context.Dispose();
        _backend.Dispose();
    }

    [Test]
    public void Calls_OfTheLargestShapes_StayWithinTheirFormulaAndNeedMostOfIt([Values(
        "SiluGate", "SiluGateBackward", "RmsNorm", "RmsNormBackward", "Rope", "ScaleColumnsBackward", "Linear", "Attention", "Decode",
        "AttentionBackward", "Logits", "CrossEntropy", "CrossEntropyF32", "Sgd", "PackSignBits", "UnpackSignBits",
        "LoraDecode")] string operation) => StayWithin(operation);

    // Beside what F32 needs: the rows as they are stored.
    [Test]
    public void CallsOnABf16Cache_OfTheLargestShapes_StayWithinTheirFormulaAndNeedMostOfIt(
        [Values("AppendKv", "Attention", "Decode", "AttentionBackward")] string operation)
    {
        TearDown();
        Open(DType.BF16, DType.F32);
        StayWithin(operation);
    }

    // Beside what F32 needs: what is widened, and on the host what libtorch brings to one type.
    [Test]
    public void CallsOnBf16Activations_OfTheLargestShapes_StayWithinTheirFormulaAndNeedMostOfIt([Values(
        "SiluGateBackward", "RmsNorm", "RmsNormBackward", "Rope", "ScaleColumnsBackward", "Linear", "LoraBackward", "LoraDecode",
        "Attention", "Decode", "AttentionBackward", "Logits", "CrossEntropy", "CrossEntropyF32", "AppendKv")] string operation)
    {
        TearDown();
        Open(DType.F32, DType.BF16);
        StayWithin(operation);
    }

    // Upper bounds alone: what fused attention takes is libtorch's business, and differs between its versions.
    [Test]
    public void CallsOfFusedAttention_OfTheLargestShapes_StayWithinTheirFormula([Values("Decode", "Prompt")] string operation)
    {
        TearDown();
        Open(DType.BF16, DType.BF16, multipliesBf16: true);
        (long formula, Action call) = CallOf(operation);
        long measured = MallocPeak.Of(call);
        TestContext.Out.WriteLine($"{operation}: {measured >> 10} KiB of {formula >> 10} KiB");
        Assert.That(measured, Is.LessThanOrEqualTo(formula + LibraryBytes));
        Assert.That(formula, Is.LessThan(_backend.ScratchBytes(Limits)), "The plan has room for each.");
    }

    [Test]
    public void ReserveScratch_Again_CountsWhatItTold()
    {
        long before = _backend.AllocatedBytes;
        foreach (ScratchLimits limits in (ScratchLimits[])[Limits with { Trains = false }, Limits, Limits with { Rows = 1 }])
        {
            _backend.ReserveScratch(limits);
            Assert.That(_backend.AllocatedBytes - before, Is.EqualTo(_backend.ScratchBytes(limits)));
        }

        Assert.That(
            () => _backend.ReserveScratch(Limits with { Vocabulary = int.MaxValue, HiddenColumns = 1 << 20 }),
            Throws.InstanceOf<OutOfMemoryException>());
        Assert.That(_backend.AllocatedBytes - before, Is.EqualTo(_backend.ScratchBytes(Limits with { Rows = 1 })));
    }

    private void Open(DType kvType, DType activations, bool multipliesBf16 = false)
    {
        var device = new torch.Device(DeviceType.CPU);
        _backend = new TorchComputeBackend(device, kvType: kvType, multipliesBf16: multipliesBf16, activationType: activations);
        _context = new TorchContext(
            device, TorchContext.ElementsMaxDefault, kvType: kvType, multipliesBf16: multipliesBf16, activationType: activations);
        _bench = new Workbench(_backend);
    }

    private void StayWithin(string operation)
    {
        (long formula, Action call) = CallOf(operation);
        long measured = MallocPeak.Of(call);
        TestContext.Out.WriteLine($"{operation}: {measured >> 10} KiB of {formula >> 10} KiB");
        Assert.That(measured, Is.LessThanOrEqualTo(formula + LibraryBytes));
        Assert.That(measured, Is.GreaterThan((formula / 2) - LibraryBytes), "Control: half the formula would not do.");
        Assert.That(formula, Is.LessThan(_backend.ScratchBytes(Limits)), "The plan has room for each.");
    }

    private (long Formula, Action Call) CallOf(string operation)
    {
        ScratchLimits limits = Limits;
        (int rows, int wide, int hidden) = (limits.Rows, limits.InputColumnsMax, limits.HiddenColumns);
        switch (operation)
        {
            case "SiluGate" or "SiluGateBackward":
                bool isForward = operation == "SiluGate";
                DeviceTensor[] gate = Activations(5, rows, wide);
                return (ElementwiseOps.ScratchBytes(_context, rows, wide, !isForward), isForward
                    ? () => _backend.SiluGate(gate[0], gate[1], gate[1])
                    : () => _backend.SiluGateBackward(gate[0], gate[1], gate[2], gate[3], gate[4]));
            case "RmsNorm" or "RmsNormBackward":
                isForward = operation == "RmsNorm";
                DeviceTensor[] norm = Activations(3, rows, wide);
                DeviceTensor gain = Tensors(1, 1, wide)[0];
                return (RowOps.NormBytes(_context, rows, wide, 1, !isForward), isForward
                    ? () => _backend.RmsNorm(norm[0], gain, 1e-5f, norm[1])
                    : () => _backend.RmsNormBackward(norm[0], gain, 1e-5f, norm[1], norm[2], accumulate: false));
            case "Rope":
                DeviceTensor heads = Activations(1, rows, wide)[0];
                DeviceTensor table = Tensors(1, limits.Positions, limits.HeadDim)[0];
                int[] positions = [.. Enumerable.Range(0, rows)];
                return (RowOps.RopeBytes(_context, rows, wide),
                    () => _backend.Rope(heads, positions, table, inverse: false));
            case "ScaleColumnsBackward":
                DeviceTensor[] scale = Activations(3, rows, wide);
                DeviceTensor[] row = Tensors(2, 1, wide);
                return (ColumnOps.ScratchBytes(_context, rows, wide, trains: true),
                    () => _backend.ScaleColumnsBackward(scale[0], scale[1], row[0], row[1], scale[2], accumulate: false));
            case "Linear":
                DeviceWeight weight = _bench.RandomWeight(hidden, wide, DType.BF16).Weight;
                (DeviceTensor x, DeviceTensor y) = (Activations(1, rows, wide)[0], Activations(1, rows, hidden)[0]);
                return (LinearOps.ScratchBytes(_context, rows, hidden, wide) + LinearOps.WideBytes(_context, rows, hidden, wide),
                    () => _backend.Linear(x, weight, null, y, accumulate: false));
            case "LoraBackward":
                DeviceTensor[] lora = Activations(3, rows, wide);
                (DeviceFactor a, DeviceFactor b) = (_bench.Factor(new(limits.RankMax, wide)), _bench.Factor(new(limits.RankMax, wide)));
                DeviceTensor[] sums = Tensors(2, limits.RankMax, wide);
                return (FactorOps.ScratchBytes(_context, rows, limits.RankMax, wide, trains: true),
                    () => _backend.LoraBypassBackward(lora[0], lora[1], a, b, 0.5f, sums[0], sums[1], lora[2]));
            case "LoraDecode":
                DeviceTensor[] decoded = Activations(2, limits.Segments, wide);
                LoraSegment[] segments = [.. Enumerable.Range(0, limits.Segments).Select(i => new LoraSegment(
                    i, 1, _bench.Factor(new(limits.RankMax, wide)), _bench.Factor(new(limits.RankMax, wide)), 1))];
                return (FactorOps.TogetherBytes(_context, limits.Segments, limits.RankMax, wide),
                    () => _backend.LoraBypass(decoded[0], segments, decoded[1]));
            case "Logits":
                DeviceWeight head = _bench.RandomWeight(limits.Vocabulary, hidden, DType.BF16).Weight;
                DeviceTensor last = Activations(1, rows, hidden)[0];
                DeviceTensor logits = Tensors(1, limits.SampledRows, limits.Vocabulary)[0];
                int[] sampled = [.. Enumerable.Range(0, limits.SampledRows)];
                return (LossOps.LogitsBytes(_context, limits.SampledRows, limits.Vocabulary, hidden),
                    () => _backend.Logits(last, sampled, head, logits));
            case "CrossEntropy" or "CrossEntropyF32":
                DType type = operation == "CrossEntropy" ? DType.BF16 : DType.F32;
                head = _bench.RandomWeight(limits.Vocabulary, hidden, type).Weight;
                DeviceTensor[] loss = Activations(2, rows, hidden);
                int[] targets = [.. Enumerable.Range(0, rows)];
                DeviceTensor losses = Tensors(1, rows, 1)[0];
                long widened = type == DType.BF16 ? 0 : LinearOps.ScratchBytes(_context, rows, limits.Vocabulary, hidden);
                return (LossOps.CrossEntropyBytes(_context, rows, limits.Vocabulary, hidden) - widened,
                    () => _backend.FusedLinearCrossEntropy(loss[0], targets, head, 1f, loss[1], losses));
            case "PackSignBits" or "UnpackSignBits":
                DeviceTensor signs = Activations(1, rows, wide - 1)[0];
                DeviceTensor packed = _bench.Packed(rows, wide - 1, PackedFormat.SignBits);
                return (PackOps.ScratchBytes(_context, rows, wide - 1), operation == "PackSignBits"
                    ? () => _backend.Pack(signs, PackedFormat.SignBits, packed)
                    : () => _backend.Unpack(packed, PackedFormat.SignBits, signs));
            case "Sgd":
                DeviceTensor[] step = Tensors(3, rows, wide);
                return (OptimizerOps.ScratchBytes((long)rows * wide),
                    () => _backend.SgdStep(step[0], step[1], step[2], new SgdStepOptions(0.1f, 0.9f, true, 0.1f)));
            default:
                return AttentionCallOf(operation);
        }
    }

    private (long Formula, Action Call) AttentionCallOf(string operation)
    {
        // An append is small beside the others: enough rows to be seen.
        ScratchLimits limits = operation == "AppendKv" ? Limits with { Positions = 16 << 10, Rows = 16 << 10 } : Limits;
        bool decodes = operation == "Decode";
        int blocks = limits.Positions / DeviceKvCache.TokensPerBlock;
        DeviceKvCache cache = _bench.Own(_backend.CreateKvCache(1, blocks, limits.KvHeads, limits.HeadDim));
        int[] table = [.. Enumerable.Range(0, blocks)];
        DeviceTensor kv = Activations(1, limits.Positions, limits.KvHeads * limits.HeadDim)[0];
        AttentionSegment[] all = [new(0, limits.Positions, 0, cache, table)];
        _backend.AppendKv(kv, kv, 0, all);
        if (operation == "AppendKv")
        {
            return (AttentionOps.AppendBytes(_context, limits), () => _backend.AppendKv(kv, kv, 0, all));
        }

        int rows = decodes ? limits.Segments : limits.Rows;
        DeviceTensor[] q = Activations(3, rows, limits.QueryHeads * limits.HeadDim);
        DeviceTensor logSumExp = Tensors(1, limits.Positions, limits.QueryHeads)[0];
        AttentionSegment window = new(
            0, rows, limits.Positions - rows, cache, table, operation == "Prompt" ? null : logSumExp);
        AttentionSegment[] segments = !decodes ? [window]
            : [.. Enumerable.Range(0, rows).Select(i => new AttentionSegment(i, 1, limits.Positions - 1 - i, cache, table))];
        if (operation != "AttentionBackward")
        {
            long formula = decodes ? AttentionOps.DecodeBytes(_context, limits)
                : operation == "Prompt" ? AttentionOps.FusedBytes(_context, limits) : AttentionOps.ScratchBytes(_context, limits);
            return (formula, () => _backend.Attention(q[0], q[1], 0, segments));
        }

        DeviceTensor[] gradients = Tensors(2, limits.Positions, limits.KvHeads * limits.HeadDim);
        return (AttentionGradient.ScratchBytes(_context, limits),
            () => _backend.AttentionBackward(q[0], q[1], 0, window, q[2], gradients[0], gradients[1]));
    }

    private DeviceTensor[] Activations(int count, int rows, int columns) => Tensors(count, rows, columns, TensorUse.Activation);

    private DeviceTensor[] Tensors(int count, int rows, int columns, TensorUse use = TensorUse.Exact) =>
        [.. Enumerable.Range(0, count).Select(_ => _bench.Own(_backend.Allocate(rows, columns, use)))];
}
