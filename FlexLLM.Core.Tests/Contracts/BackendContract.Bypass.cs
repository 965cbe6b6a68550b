using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>The operations that a bypass is composed of.</summary>
internal abstract partial class BackendContract
{
    protected static readonly int[] BypassRows = [0, 1, 5, 7, 33];

    protected static readonly int[] Inners = [1, 3, 16, 17, 64];

    protected static readonly int[] Widths = [1, 8, 37, 300];

    [Test]
    public void Narrow_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Inners))] int inner, [Values(1f, -0.7f)] float scale,
        [Values] bool accumulate)
    {
        FactorChecks.Narrow(Backend, rows, inner, 37, scale, accumulate);
        FactorChecks.Narrow(Backend, rows, inner, 1, scale, accumulate);
        FactorChecks.Narrow(Backend, rows, inner, 64, scale, accumulate);
    }

    [Test]
    public void Widen_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Inners))] int inner, [Values(1f, -0.7f)] float scale,
        [Values] bool accumulate)
    {
        FactorChecks.Widen(Backend, rows, inner, 37, scale, accumulate);
        FactorChecks.Widen(Backend, rows, inner, 1, scale, accumulate);
        FactorChecks.Widen(Backend, rows, inner, 64, scale, accumulate);
    }

    [Test]
    public void AddOuter_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Inners))] int inner, [Values(1f, -0.7f)] float scale)
    {
        FactorChecks.AddOuter(Backend, rows, inner, 37, scale);
        FactorChecks.AddOuter(Backend, rows, inner, 1, scale);
        FactorChecks.AddOuter(Backend, rows, inner, 64, scale);
    }

    [Test]
    public void FactorProducts_LongOrWide_MatchReference([Values] bool accumulate)
    {
        FactorChecks.Narrow(Backend, 33, 70, 1100, 0.3f, accumulate);
        FactorChecks.Narrow(Backend, 2, 7, 1100, 0.3f, accumulate);
        FactorChecks.Widen(Backend, 110, 70, 530, 0.3f, accumulate);
        FactorChecks.Widen(Backend, 2, 7, 1100, 0.3f, accumulate);
        FactorChecks.AddOuter(Backend, 210, 19, 300, 0.3f);
        FactorChecks.AddOuter(Backend, 130, 70, 37, 1f);
    }

    [Test]
    public void FactorProducts_AfterRefresh_UseTheNewValues() => FactorChecks.Refresh(Backend);

    [Test]
    public void AddBias_RoundsOnce([ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Widths))] int columns) =>
        ColumnChecks.AddBias(Backend, rows, columns);

    [Test]
    public void AddColumnSums_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Widths))] int columns) =>
        ColumnChecks.AddColumnSums(Backend, rows, columns);

    [Test]
    public void ScaleColumns_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Widths))] int columns, [Values] bool accumulate,
        [Values] bool inPlace) =>
        ColumnChecks.ScaleColumns(Backend, rows, columns, accumulate, inPlace);

    [Test]
    public void ScaleColumnsBackward_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Widths))] int columns, [Values] bool accumulate,
        [Values] bool inPlace) =>
        ColumnChecks.ScaleColumnsBackward(Backend, rows, columns, accumulate, inPlace);

    [Test]
    public void ScaleColumnsBackward_WithoutDx_MatchesReference([ValueSource(nameof(BypassRows))] int rows) =>
        ColumnChecks.ScaleColumnsBackward(Backend, rows, 37, accumulate: false, inPlace: false, withDx: false);

    [Test]
    public void CopyColumns_AnyPlaces_WritesNothingElse([ValueSource(nameof(BypassRows))] int rows)
    {
        ColumnChecks.Copy(Backend, rows, 0, 0, 29);
        ColumnChecks.Copy(Backend, rows, 40, 3, 1);
        ColumnChecks.Copy(Backend, rows, 7, 12, 17);
        ColumnChecks.Copy(Backend, rows, 41, 29, 0);
        ColumnChecks.CopyInPlace(Backend, rows);
    }

    [Test]
    public void ColumnOperations_ManyRows_MatchReference()
    {
        ColumnChecks.AddBias(Backend, 1100, 61);
        ColumnChecks.AddColumnSums(Backend, 1100, 61);
        ColumnChecks.ScaleColumns(Backend, 1100, 61, accumulate: true, inPlace: true);
        ColumnChecks.ScaleColumnsBackward(Backend, 1100, 61, accumulate: true, inPlace: true);
        ColumnChecks.Copy(Backend, 4000, 7, 2, 19);
    }

    [Test]
    public void Relu_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Widths))] int columns, [Values] bool inPlace) =>
        DenseChecks.Relu(Backend, rows, columns, inPlace);

    [Test]
    public void ReluBackward_AnyAlias_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Widths))] int columns,
        [Values(0, 1, 2)] int destination) =>
        DenseChecks.ReluBackward(Backend, rows, columns, destination);

    [Test]
    public void Silu_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Widths))] int columns, [Values] bool inPlace,
        [Values(3, 200)] int scale) =>
        DenseChecks.Silu(Backend, rows, columns, inPlace, scale);

    [Test]
    public void SiluBackward_AnyAlias_MatchesReference(
        [ValueSource(nameof(BypassRows))] int rows, [ValueSource(nameof(Widths))] int columns,
        [Values(0, 1, 2)] int destination, [Values(3, 200)] int scale) =>
        DenseChecks.SiluBackward(Backend, rows, columns, destination, scale);

    [Test]
    public void Pack_AnyRow_ComesBack(
        [ValueSource(nameof(BypassRows))] int rows, [Values(1, 2, 15, 16, 17, 31, 32, 33, 64, 300, 301)] int columns,
        [Values] PackedFormat format) =>
        PackChecks.RoundTrip(Backend, rows, columns, format);

    [Test]
    public void Pack_ManyRows_ComesBack([Values] PackedFormat format) => PackChecks.RoundTrip(Backend, 700, 101, format);

    [Test]
    public void Copies_OfAnyBits_KeepThem() => PackChecks.CopiesAreBitwise(Backend);

    [Test]
    public void Adapter_ComposedOfSmallOperations_HasItsGradients([Values] bool silu) => CompositionChecks.Adapter(Backend, silu);
}
