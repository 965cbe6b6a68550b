using FlexLLM.Backends;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>
/// What every backend must do, against plain loops in double. Ragged sizes are the point; guard rows, unread rows and
/// unwritten KV slots hold NaN.
/// </summary>
internal abstract partial class BackendContract
{
    protected static readonly int[] RowCounts = [0, 1, 5, 7, 33, 130];

    protected static readonly HeadShape[] HeadShapes =
        [new(2, 1, 8), new(2, 2, 6), new(1, 3, 10), new(2, 7, 4), new(1, 1, 64), new(1, 2, 34)];

    // The last takes long steps, so that bias corrections computed in F32 are seen.
    protected static readonly AdamWStepOptions[] AdamWOptions =
    [
        new(0.01f, 0.9f, 0.999f, 1e-8f, 0.01f, 1), new(0.02f, 0.8f, 0.95f, 1e-6f, 0, 1000),
        new(1f, 0.9f, 0.999f, 1e-8f, 0, 1),
    ];

    protected IComputeBackend Backend { get; private set; } = null!;

    /// <summary>What the backend's KV caches hold. Attention is compared with that of keys and values rounded to it.</summary>
    protected virtual DType KvType => DType.F32;

    /// <summary>
    /// What the backend's activations are. Operations are compared with references computed from numbers that it holds exactly, within the
    /// tolerances of F32 and one rounding to it where they write it: products with a bias and rotations two, gates three.
    /// </summary>
    protected virtual DType ActivationType => DType.F32;

    /// <summary>Devices that each hold all of what is allocated.</summary>
    protected virtual int Devices => 1;

    [OneTimeSetUp]
    public void Open() => Backend = CreateBackend();

    [OneTimeTearDown]
    public void Close() => Backend.Dispose();

    [Test]
    public void Allocate_AnyShape_IsZero([ValueSource(nameof(RowCounts))] int rows) => MemoryChecks.Allocate(Backend, rows, 13);

    [Test]
    public void Tensors_OfEachUse_HaveItsType() => MemoryChecks.Types(Backend, ActivationType, Devices);

    [Test]
    public void AllocatedBytes_CreateAndDispose_AddsUp() => MemoryChecks.Accounting(Backend);

    [Test]
    public void ToldBytes_AnyShape_AreReal([ValueSource(nameof(RowCounts))] int rows, [Values(1, 5, 16, 37)] int columns) =>
        MemoryChecks.ToldBytes(Backend, rows, columns);

    [TestCase(20, 16, 48)]
    [TestCase(32, 16, 35, 16, 16)]
    [TestCase(3, 3)]
    public void ResizeKvCache_ToWholeExtents_KeepsWhatStays(int blocks, params int[] sizes) =>
        MemoryChecks.Resize(Backend, blocks, sizes);

    [Test]
    public void ResizeKvCache_WithinAnExtent_IsABrokenInvariant() => MemoryChecks.ResizeWithinAnExtent(Backend);

    [Test]
    public void Resources_Created_DescribeThemselves() => MemoryChecks.Description(Backend, KvType);

    [Test]
    public void Upload_Slice_WritesNothingElse([ValueSource(nameof(RowCounts))] int rows) =>
        MemoryChecks.Upload(Backend, rows, 11);

    [Test]
    public void Copy_Slice_WritesNothingElse([ValueSource(nameof(RowCounts))] int rows) =>
        MemoryChecks.Copy(Backend, rows, 11);

    [Test]
    public void Zero_Slice_WritesNothingElse([ValueSource(nameof(RowCounts))] int rows) =>
        MemoryChecks.Zero(Backend, rows, 11);

    [Test]
    public void CreateWeight_AnySource_RoundsToNearestEven(
        [Values] DType source, [Values(DType.F32, DType.BF16)] DType type) =>
        MemoryChecks.CreateWeight(Backend, source, type);

    [Test]
    public void Gather_AnyIds_CopiesRows(
        [ValueSource(nameof(RowCounts))] int rows, [Values(DType.F32, DType.BF16)] DType type) =>
        MemoryChecks.Gather(Backend, rows, 37, type);

    [TestCaseSource(typeof(ShapeChecks), nameof(ShapeChecks.Names))]
    public void WrongShape_IsABrokenInvariant(string mistake) => ShapeChecks.Throws(Backend, mistake);

    [Test]
    public void RmsNorm_MatchesReference(
        [ValueSource(nameof(RowCounts))] int rows, [Values(1, 37, 64)] int n, [Values(1, 3)] int groups,
        [Values] bool inPlace) =>
        DenseChecks.RmsNorm(Backend, rows, n, groups, inPlace: inPlace);

    [TestCase(1e-5f, 1e-4)]
    [TestCase(0.5f, 1)]
    [TestCase(1e-6f, 1e4)]
    public void RmsNorm_AnyEpsilonAndScale_MatchesReference(float epsilon, double scale) =>
        DenseChecks.RmsNorm(Backend, 5, 37, 1, epsilon, scale: scale);

    [Test]
    public void RmsNormBackward_MatchesReference(
        [ValueSource(nameof(RowCounts))] int rows, [Values(1, 37, 64)] int n, [Values(1, 3)] int groups,
        [Values] bool accumulate) =>
        DenseChecks.RmsNormBackward(Backend, rows, n, groups, accumulate);

    [Test]
    public void RmsNormBackward_InPlaceOrLargeEpsilon_MatchesReference([ValueSource(nameof(RowCounts))] int rows)
    {
        DenseChecks.RmsNormBackward(Backend, rows, 37, 2, accumulate: false, inPlace: true);
        DenseChecks.RmsNormBackward(Backend, rows, 37, 1, accumulate: false, epsilon: 0.5f);
    }

    [Test]
    public void Linear_MatchesReference(
        [ValueSource(nameof(RowCounts))] int rows, [Values(DType.F32, DType.BF16)] DType type, [Values] bool bias,
        [Values] bool accumulate)
    {
        DenseChecks.Linear(Backend, rows, 37, 29, type, bias, accumulate);
        DenseChecks.Linear(Backend, rows, 1, 3, type, bias, accumulate);
        DenseChecks.Linear(Backend, rows, 64, 48, type, bias, accumulate);
    }

    [Test]
    public void Linear_LongOrWide_MatchesReference([Values(DType.F32, DType.BF16)] DType type)
    {
        DenseChecks.Linear(Backend, 9, 1100, 19, type, bias: true, accumulate: false);
        DenseChecks.Linear(Backend, 9, 1100, 19, type, bias: false, accumulate: false);
        DenseChecks.Linear(Backend, 3, 1100, 19, type, bias: false, accumulate: true);
        DenseChecks.Linear(Backend, 20, 19, 1100, type, bias: true, accumulate: true);
        DenseChecks.LinearBackwardInput(Backend, 9, 19, 1100, type, accumulate: true);
        DenseChecks.LinearBackwardInput(Backend, 20, 1100, 19, type, accumulate: false);
    }

    [Test]
    public void LinearBackwardInput_MatchesReference(
        [ValueSource(nameof(RowCounts))] int rows, [Values(DType.F32, DType.BF16)] DType type, [Values] bool accumulate)
    {
        DenseChecks.LinearBackwardInput(Backend, rows, 37, 29, type, accumulate);
        DenseChecks.LinearBackwardInput(Backend, rows, 3, 1, type, accumulate);
        DenseChecks.LinearBackwardInput(Backend, rows, 64, 48, type, accumulate);
    }

    [Test]
    public void Rope_MatchesReference(
        [ValueSource(nameof(RowCounts))] int rows, [Values(2, 6, 10, 32)] int headDim, [Values] bool inverse) =>
        DenseChecks.Rope(Backend, rows, 3, headDim, inverse);

    [Test]
    public void SiluGate_MatchesReference(
        [ValueSource(nameof(RowCounts))] int rows, [Values(0, 1, 2)] int destination, [Values(1, 37)] int columns) =>
        DenseChecks.SiluGate(Backend, rows, columns, destination);

    [Test]
    public void SiluGateBackward_AnyAliases_MatchesReference(
        [Values(0, 1, 7)] int rows, [Values(0, 1, 2, 3)] int dGate, [Values(0, 1, 2, 3)] int dUp)
    {
        if (dGate == 0 || dGate != dUp)
        {
            DenseChecks.SiluGateBackward(Backend, rows, 37, dGate, dUp);
        }
    }

    [Test]
    public void SiluGate_ExtremeGates_StaysFinite()
    {
        DenseChecks.SiluGate(Backend, 5, 37, scale: 200);
        DenseChecks.SiluGateBackward(Backend, 5, 37, scale: 200);
    }

    [Test]
    public void RowwiseOperations_ManyRows_MatchesReference()
    {
        DenseChecks.RmsNorm(Backend, 1100, 61, 1);
        DenseChecks.RmsNormBackward(Backend, 1100, 31, 2, accumulate: true);
        DenseChecks.Rope(Backend, 1100, 6, 10, inverse: false);
        DenseChecks.SiluGate(Backend, 1100, 61);
        DenseChecks.SiluGateBackward(Backend, 1100, 61);
        DenseChecks.Add(Backend, 1100, 61);
    }

    [Test]
    public void Add_AnyAlias_RoundsOnce([ValueSource(nameof(RowCounts))] int rows, [Values(0, 1, 2)] int destination) =>
        DenseChecks.Add(Backend, rows, 37, destination);

    [Test]
    public void LoraBypass_OneSegment_MatchesReference(
        [ValueSource(nameof(RowCounts))] int rows, [Values(1, 4, 8, 20)] int rank)
    {
        LoraChecks.Forward(Backend, 37, 29, [rank], rows);
        LoraChecks.Forward(Backend, 16, 64, [rank], rows);
    }

    [Test]
    public void LoraBypass_ManySegments_MatchesReference() =>
        LoraChecks.Forward(Backend, 37, 29, [4, 20, 1, 8], 5, 0, 1, 33, 7, 1);

    [Test]
    public void LoraBypass_DecodeRowsBelowEachOther_MatchReferenceEachByItself()
    {
        LoraChecks.DecodeRows(Backend, 37, 29, (4, 2), (4, 2), (4, 2), (4, 2), (4, 2), (4, 2), (20, 2), (20, 2), (20, 2), (4, 1), (4, 2));
        LoraChecks.DecodeRows(Backend, 16, 64, (1, 0.5f), (1, 0.5f), (1, 0.5f));
    }

    [Test]
    public void LoraBypass_WideLayer_MatchesReference()
    {
        LoraChecks.Forward(Backend, 300, 280, [5], 30);
        LoraChecks.Backward(Backend, 30, 300, 280, 5, withDx: true);
    }

    [Test]
    public void LoraBypass_AfterRefresh_UsesTheNewValues() => LoraChecks.Refresh(Backend);

    [Test]
    public void LoraBypassBackward_MatchesReference(
        [ValueSource(nameof(RowCounts))] int rows, [Values(1, 4, 8, 20)] int rank, [Values] bool withDx)
    {
        LoraChecks.Backward(Backend, rows, 37, 29, rank, withDx);
        LoraChecks.Backward(Backend, rows, 16, 40, rank, withDx);
    }

    [Test]
    public void Attention_DecodeRows_MatchesReference(
        [ValueSource(nameof(HeadShapes))] HeadShape shape, [Values] bool keepLogSumExp) =>
        AttentionChecks.Forward(
            Backend, shape, keepLogSumExp, 1, new(0, 1), new(1, 1, 1), new(15, 1), new(16, 1, 1), new(46, 1));

    [Test]
    public void Attention_MixedSegments_MatchesReference(
        [ValueSource(nameof(HeadShapes))] HeadShape shape) =>
        AttentionChecks.Forward(
            Backend, shape, keepLogSumExp: true, 1, new(0, 7, 1), new(3, 0), new(20, 5), new(0, 0), new(33, 1, 2),
            new(14, 33, 1));

    [TestCase(0, 130)]
    [TestCase(97, 33)]
    public void Attention_LongSegment_MatchesReference(int start, int count) =>
        AttentionChecks.Forward(Backend, new HeadShape(2, 2, 6), keepLogSumExp: true, 1, new Part(start, count));

    [Test]
    public void AppendKv_AnyValue_IsRoundedToNearestEven() => AttentionChecks.Stored(Backend, KvType);

    [Test]
    public void Attention_LargeScores_StaysFinite() =>
        AttentionChecks.Forward(Backend, new HeadShape(2, 3, 8), keepLogSumExp: true, 30, new Part(5, 40));

    [Test]
    public void AttentionBackward_AnyWindow_MatchesReference(
        [ValueSource(nameof(HeadShapes))] HeadShape shape, [Values(0, 1, 5, 7, 33)] int count, [Values(0, 14)] int start) =>
        AttentionChecks.Backward(Backend, shape, start + count + 4, start, count);

    [TestCase(0, 130)]
    [TestCase(97, 33)]
    public void AttentionBackward_LongSample_MatchesReference(int start, int count) =>
        AttentionChecks.Backward(Backend, new HeadShape(2, 2, 6), 130, start, count);

    [Test]
    public void AttentionBackward_LargeScores_StaysFinite() =>
        AttentionChecks.Backward(Backend, new HeadShape(2, 3, 8), 45, 5, 40, scale: 20);

    [Test]
    public void Logits_ChosenRows_MatchesReference(
        [Values(0, 1, 5, 33)] int chosen, [Values(DType.F32, DType.BF16)] DType type) =>
        LossChecks.Logits(Backend, chosen, 37, 83, type);

    [Test]
    public void ArgMax_TiesAndRowsWithoutALargest_MatchesReference([Values(0, 1, 9, 40)] int rows, [Values(1, 37, 1000)] int columns) =>
        LossChecks.ArgMax(Backend, rows, columns);

    [Test]
    public void Largest_TiesAndOddValues_MatchesReference(
        [Values(0, 1, 9)] int rows, [Values(1, 37, 1000)] int columns, [Values(1, 5, ScratchLimits.LargestMax)] int count) =>
        LossChecks.Largest(Backend, rows, columns, Math.Min(count, columns));

    [Test]
    public void FusedLinearCrossEntropy_MatchesReference(
        [ValueSource(nameof(RowCounts))] int rows, [Values(0, 1, 2, 3)] int targetEvery,
        [Values(DType.F32, DType.BF16)] DType type) =>
        LossChecks.CrossEntropy(Backend, rows, 21, 83, targetEvery, type);

    [Test]
    public void FusedLinearCrossEntropy_LargeLogitsOrVocabulary_StaysFinite()
    {
        LossChecks.CrossEntropy(Backend, 5, 37, 83, 1, scale: 60);
        LossChecks.CrossEntropy(Backend, 3, 7, 9001, 1);
        LossChecks.CrossEntropy(Backend, 3, 7, 1, 1);
    }

    [Test]
    public void SgdStep_MatchesReference(
        [Values(0f, 0.9f)] float momentum, [Values] bool nesterov, [Values(0f, 0.125f)] float weightDecay,
        [Values(1, 5, 33)] int rows) =>
        OptimizerChecks.Sgd(Backend, rows, 13, new SgdStepOptions(0.1f, momentum, nesterov, weightDecay));

    [Test]
    public void AdamWStep_MatchesReference(
        [ValueSource(nameof(AdamWOptions))] AdamWStepOptions options, [Values(1, 5, 33)] int rows) =>
        OptimizerChecks.AdamW(Backend, rows, 13, options);

    protected abstract IComputeBackend CreateBackend();
}
