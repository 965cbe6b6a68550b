using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>The operations that a bypass is composed of.</summary>
internal sealed partial class BackendContractControlTests
{
    private static readonly Dictionary<string, Action<IComputeBackend>> BypassControls = new()
    {
        ["copy changes a NaN"] = PackChecks.CopiesAreBitwise,
        ["column copy changes a NaN"] = PackChecks.CopiesAreBitwise,
        ["narrow scales what it adds to"] = backend => NarrowCheck(backend, accumulate: true),
        ["narrow without scale"] = backend => NarrowCheck(backend, accumulate: false),
        ["narrow overwrites"] = backend => NarrowCheck(backend, accumulate: true),
        ["narrow off by 1e-5"] = backend => NarrowCheck(backend, accumulate: false),
        ["narrow depends on its company"] = backend => DeterminismChecks.AnySplit(backend, "Narrow", 5),
        ["widen scales twice"] = backend => WidenCheck(backend, accumulate: false),
        ["widen overwrites"] = backend => WidenCheck(backend, accumulate: true),
        ["widen off by 1e-5"] = backend => WidenCheck(backend, accumulate: false),
        ["refresh forgets a row"] = FactorChecks.Refresh,
        ["outer products overwrite"] = Outer,
        ["outer products miss the first row"] = Outer,
        ["outer products in ascending order"] = backend => DeterminismChecks.AnySplit(backend, "AddOuter", 9),
        ["bias in the first row alone"] = backend => ColumnChecks.AddBias(backend, 5, 7),
        ["column sums overwrite"] = backend => ColumnChecks.AddColumnSums(backend, 5, 7),
        ["column sums in ascending order"] = backend => DeterminismChecks.AnySplit(backend, "AddColumnSums", 9),
        ["scaled columns by gain alone"] = backend => Scale(backend, accumulate: false),
        ["scaled columns overwrite"] = backend => Scale(backend, accumulate: true),
        ["gain gradient overwrites"] = backend => ScaleBackward(backend, accumulate: false),
        ["gain gradient of what it wrote"] = backend => ScaleBackward(backend, accumulate: false),
        ["scaled column gradient overwrites"] = backend => ScaleBackward(backend, accumulate: true),
        ["scaled column gradient without dx"] = backend => ScaleBackward(backend, accumulate: false),
        ["gain gradient in ascending order"] = backend => DeterminismChecks.AnySplit(backend, "ScaleColumnsBackward", 9),
        ["columns from one to the left"] = backend => ColumnChecks.Copy(backend, 5, 7, 12, 9),
        ["columns but the last"] = backend => ColumnChecks.Copy(backend, 5, 7, 12, 9),
        ["narrow forgets a column"] = backend => CompositionChecks.Adapter(backend, silu: false),
        ["relu leaks"] = backend => DenseChecks.Relu(backend, 5, 7),
        ["relu of a negative is -0"] = backend => DenseChecks.Relu(backend, 5, 7),
        ["relu gradient passes at zero"] = backend => DenseChecks.ReluBackward(backend, 5, 7),
        ["silu off by 1e-5"] = backend => DenseChecks.Silu(backend, 5, 7),
        ["silu gradient of the result"] = backend => DenseChecks.SiluBackward(backend, 5, 7),
        ["silu gradient off by 1e-5"] = backend => DenseChecks.SiluBackward(backend, 5, 7),
        ["packed BF16 truncated"] = backend => PackChecks.RoundTrip(backend, 5, 7, PackedFormat.BF16),
        ["sign bit of zero set"] = backend => PackChecks.RoundTrip(backend, 9, 7, PackedFormat.SignBits),
        ["sign bit of NaN set"] = backend => PackChecks.RoundTrip(backend, 9, 7, PackedFormat.SignBits),
        ["packing depends on its company"] = backend => PackChecks.RoundTrip(backend, 33, 64, PackedFormat.BF16),
        ["last column not unpacked"] = backend => PackChecks.RoundTrip(backend, 5, 33, PackedFormat.BF16),
        ["unpacking spoils what it reads"] = backend => PackChecks.RoundTrip(backend, 33, 64, PackedFormat.BF16),
    };

    private static void NarrowCheck(IComputeBackend backend, bool accumulate) =>
        FactorChecks.Narrow(backend, 5, 3, 37, 0.7f, accumulate);

    private static void WidenCheck(IComputeBackend backend, bool accumulate) =>
        FactorChecks.Widen(backend, 5, 3, 37, 0.7f, accumulate);

    private static void Outer(IComputeBackend backend) => FactorChecks.AddOuter(backend, 5, 3, 37, 0.7f);

    private static void Scale(IComputeBackend backend, bool accumulate) =>
        ColumnChecks.ScaleColumns(backend, 5, 7, accumulate, inPlace: false);

    private static void ScaleBackward(IComputeBackend backend, bool accumulate) =>
        ColumnChecks.ScaleColumnsBackward(backend, 5, 7, accumulate, inPlace: true);
}
