using FlexLLM.Backends;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>Controls: each check of the contract passes the sound backend and catches a small fault planted into it.</summary>
[TestFixture]
internal sealed partial class BackendContractControlTests
{
    private static readonly HeadShape Heads = new(KvHeads: 2, Group: 3, HeadDim: 6);

    private static readonly Dictionary<string, Action<IComputeBackend>> Controls = new()
    {
        ["allocated memory is dirty"] = backend => MemoryChecks.Allocate(backend, 5, 11),
        ["tensors told a row short"] = backend => MemoryChecks.ToldBytes(backend, 5, 11),
        ["factors told without a column"] = backend => MemoryChecks.ToldBytes(backend, 5, 11),
        ["one layer told for all"] = backend => MemoryChecks.ToldBytes(backend, 5, 11),
        ["resize forgets the keys"] = backend => MemoryChecks.Resize(backend, 20, 16),
        ["upload spills into the next row"] = backend => MemoryChecks.Upload(backend, 5, 11),
        ["download flips a sign"] = backend => MemoryChecks.Upload(backend, 5, 11),
        ["copy drops the last row"] = backend => MemoryChecks.Copy(backend, 5, 11),
        ["zero spills into the next row"] = backend => MemoryChecks.Zero(backend, 5, 11),
        ["BF16 truncated"] = backend => MemoryChecks.CreateWeight(backend, DType.F32, DType.BF16),
        ["gather reads the row before"] = backend => MemoryChecks.Gather(backend, 5, 11, DType.F32),
        ["norm without epsilon"] = backend => DenseChecks.RmsNorm(backend, 5, 37, 1),
        ["norm off by 1e-5"] = backend => DenseChecks.RmsNorm(backend, 5, 37, 2),
        ["norm gradient overwrites"] = backend => DenseChecks.RmsNormBackward(backend, 5, 37, 1, accumulate: true),
        ["norm gradient off by 1e-5"] = backend => DenseChecks.RmsNormBackward(backend, 5, 37, 1, accumulate: false),
        ["linear forgets its bias"] = backend => Linear(backend, accumulate: false),
        ["linear overwrites"] = backend => Linear(backend, accumulate: true),
        ["linear off by 1e-5"] = backend => Linear(backend, accumulate: false),
        ["linear gradient overwrites"] = backend => LinearBackwardInput(backend, accumulate: true),
        ["linear gradient off by 1e-5"] = backend => LinearBackwardInput(backend, accumulate: false),
        ["lora scale off by 1e-5"] = backend => LoraChecks.Forward(backend, 11, 9, [4], 5),
        ["lora segment starts a row early"] = backend => LoraChecks.Forward(backend, 37, 29, [4], 5),
        ["lora takes the first adapter"] = backend => LoraChecks.Forward(backend, 37, 29, [4, 8], 5, 3),
        ["refresh takes stale values"] = LoraChecks.Refresh,
        ["lora gradients overwrite"] = backend => LoraChecks.Backward(backend, 5, 37, 29, 4, withDx: true),
        ["lora gradient without scale"] = backend => LoraChecks.Backward(backend, 5, 37, 29, 4, withDx: false),
        ["lora gradient without dx"] = backend => LoraChecks.Backward(backend, 5, 37, 29, 4, withDx: true),
        ["rope one position early"] = backend => DenseChecks.Rope(backend, 5, 3, 6, inverse: false),
        ["rope never inverse"] = backend => DenseChecks.Rope(backend, 5, 3, 6, inverse: true),
        ["values stored as keys"] = Attention,
        ["values rounded to BF16"] = backend => AttentionChecks.Stored(backend, DType.F32),
        ["one layer for all"] = Attention,
        ["append one position late"] = Attention,
        ["attention sees the next position"] = Attention,
        ["attention misses its own position"] = Attention,
        ["no log-sum-exp"] = Attention,
        ["heads interleaved instead of grouped"] = Attention,
        ["attention off by 1e-4"] = Attention,
        ["key gradients overwrite"] = AttentionBackward,
        ["window one position early"] = AttentionBackward,
        ["query gradient off by 1e-3"] = AttentionBackward,
        ["value gradients after the window"] = AttentionBackward,
        ["gate and up swapped"] = backend => DenseChecks.SiluGate(backend, 5, 37),
        ["gate gradients swapped"] = backend => DenseChecks.SiluGateBackward(backend, 5, 37),
        ["a plus a"] = backend => DenseChecks.Add(backend, 5, 37),
        ["logits of the row before"] = backend => LossChecks.Logits(backend, 3, 37, 29, DType.F32),
        ["the last column chosen"] = backend => LossChecks.ArgMax(backend, 9, 37),
        ["a row of NaN has a largest"] = backend => LossChecks.ArgMax(backend, 9, 37),
        ["the last of the largest is too small"] = backend => LossChecks.Largest(backend, 9, 37, 5),
        ["one of the largest twice"] = backend => LossChecks.Largest(backend, 9, 37, 5),
        ["numbers for a row of NaN"] = backend => LossChecks.Largest(backend, 9, 37, 5),
        ["rows without a target count"] = CrossEntropy,
        ["loss gradient not scaled"] = CrossEntropy,
        ["target before"] = CrossEntropy,
        ["losses scaled"] = CrossEntropy,
        ["sgd without nesterov"] = Sgd,
        ["sgd without decay"] = Sgd,
        ["adamw counts from zero"] = AdamW,
        ["adamw without decay"] = AdamW,
        ["linear depends on its company"] = backend => DeterminismChecks.AnySplit(backend, "Linear F32", 5),
        ["attention depends on its company"] = backend => DeterminismChecks.AnySplit(backend, "AppendKv and Attention", 5),
        ["lora gradients in ascending order"] = backend => DeterminismChecks.AnySplit(backend, "LoraBypassBackward", 9),
        ["key gradients in ascending order"] = backend => DeterminismChecks.AnySplit(backend, "AttentionBackward", 9),
    };

    private static IEnumerable<string> Faults => [.. Controls.Keys, .. BypassControls.Keys];

    [TestCaseSource(nameof(Faults))]
    public void Check_PlantedFault_IsCaught(string fault)
    {
        using var sound = new ReferenceBackend();
        Action<IComputeBackend> check = Controls.GetValueOrDefault(fault) ?? BypassControls[fault];
        Assert.DoesNotThrow(() => check(sound));
        Assert.Throws<AssertionException>(() => check(new FaultyBackend(sound, fault)));
    }

    [Test]
    public void SameBits_ThreadsThatDiffer_AreCaught()
    {
        using var sound = new ReferenceBackend();
        using var other = new FaultyBackend(new ReferenceBackend(), "linear off by 1e-5");
        Assert.Throws<AssertionException>(() => DeterminismChecks.SameBits("Linear F32", 3, sound, other));
    }

    private static void Linear(IComputeBackend backend, bool accumulate) =>
        DenseChecks.Linear(backend, 5, 11, 29, DType.F32, bias: true, accumulate);

    private static void LinearBackwardInput(IComputeBackend backend, bool accumulate) =>
        DenseChecks.LinearBackwardInput(backend, 5, 37, 11, DType.F32, accumulate);

    private static void Attention(IComputeBackend backend) =>
        AttentionChecks.Forward(backend, Heads, keepLogSumExp: true, 1, new(3, 5), new(20, 1));

    private static void AttentionBackward(IComputeBackend backend) => AttentionChecks.Backward(backend, Heads, 25, 14, 7);

    private static void CrossEntropy(IComputeBackend backend) => LossChecks.CrossEntropy(backend, 6, 7, 29, 2);

    private static void Sgd(IComputeBackend backend) =>
        OptimizerChecks.Sgd(backend, 3, 7, new SgdStepOptions(0.1f, 0.9f, Nesterov: true, 0.01f));

    private static void AdamW(IComputeBackend backend) =>
        OptimizerChecks.AdamW(backend, 3, 7, new AdamWStepOptions(0.01f, 0.9f, 0.999f, 1e-8f, 0.01f, 1));
}
