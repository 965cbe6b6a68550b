using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>The operations that a bypass is composed of.</summary>
internal static partial class SplitOperations
{
    private const int Inner = 19;
    private const int VeryWide = 300;

    private static SplitRun NarrowFactor(Workbench bench, int rows)
    {
        (Operand x, DeviceFactor m) = (Random(bench, rows, VeryWide), bench.Factor(bench.Random(Inner, VeryWide)));
        return Rows(bench, rows, Inner, (part, u) => bench.Backend.Narrow(Cut(x, part), m, 0.7f, u, accumulate: true));
    }

    private static SplitRun WidenFactor(Workbench bench, int rows)
    {
        (Operand u, DeviceFactor m) = (Random(bench, rows, Inner), bench.Factor(bench.Random(Inner, VeryWide)));
        return Rows(bench, rows, VeryWide, (part, y) => bench.Backend.Widen(Cut(u, part), m, 0.7f, y, accumulate: true));
    }

    private static SplitRun AddBias(Workbench bench, int rows)
    {
        DeviceTensor bias = bench.Constant(bench.Random(1, Wide));
        return Rows(bench, rows, Wide, (_, y) => bench.Backend.AddBias(y, bias));
    }

    private static SplitRun ScaleColumns(Workbench bench, int rows)
    {
        (Operand x, DeviceTensor gain) = (Random(bench, rows, Wide), bench.Constant(bench.Random(1, Wide)));
        return Rows(bench, rows, Wide, (part, y) => bench.Backend.ScaleColumns(Cut(x, part), gain, y, accumulate: true));
    }

    private static SplitRun CopyColumns(Workbench bench, int rows)
    {
        Operand x = Random(bench, rows, Wide);
        return Rows(bench, rows, Narrow, (part, y) => bench.Backend.CopyColumns(Cut(x, part), 13, y, 5, 29));
    }

    private static SplitRun Relu(Workbench bench, int rows) =>
        Rows(bench, rows, Wide, (_, y) => bench.Backend.Relu(y, y));

    private static SplitRun ReluBackward(Workbench bench, int rows)
    {
        Operand x = Random(bench, rows, Wide);
        return Rows(bench, rows, Wide, (part, dy) => bench.Backend.ReluBackward(Cut(x, part), dy, dy));
    }

    private static SplitRun Silu(Workbench bench, int rows) =>
        Rows(bench, rows, Wide, (_, y) => bench.Backend.Silu(y, y));

    private static SplitRun SiluBackward(Workbench bench, int rows)
    {
        Operand x = Random(bench, rows, Wide);
        return Rows(bench, rows, Wide, (part, dy) => bench.Backend.SiluBackward(Cut(x, part), dy, dy));
    }

    private static SplitRun PackAndUnpack(Workbench bench, int rows, PackedFormat format) =>
        Rows(bench, rows, Wide, (part, y) =>
        {
            DeviceTensor packed = bench.Packed(part.Count, Wide, format);
            bench.Backend.Pack(y, format, packed);
            bench.Backend.Unpack(packed, format, y);
        });

    private static SplitRun AddOuter(Workbench bench, int rows)
    {
        (Operand u, Operand x) = (Random(bench, rows, Inner), Random(bench, rows, VeryWide));
        Matrix before = bench.Random(Inner, VeryWide);
        return parts => Accumulated(bench, before, parts, (part, gradient) =>
            bench.Backend.AddOuter(Cut(u, part), Cut(x, part), 0.7f, gradient));
    }

    private static SplitRun AddColumnSums(Workbench bench, int rows)
    {
        (Operand dy, Matrix before) = (Random(bench, rows, VeryWide), bench.Random(1, VeryWide));
        return parts => Accumulated(bench, before, parts, (part, gradient) =>
            bench.Backend.AddColumnSums(Cut(dy, part), gradient));
    }

    private static SplitRun ScaleColumnsBackward(Workbench bench, int rows)
    {
        (Operand x, Operand dy) = (Random(bench, rows, VeryWide), Random(bench, rows, VeryWide));
        DeviceTensor gain = bench.Constant(bench.Random(1, VeryWide));
        (Matrix before, Matrix oldDx) = (bench.Random(1, VeryWide), bench.Random(rows, VeryWide));
        return parts =>
        {
            Operand dx = bench.Target(oldDx);
            Matrix[] sums = Accumulated(bench, before, parts, (part, gradGain) => bench.Backend.ScaleColumnsBackward(
                Cut(x, part), Cut(dy, part), gain, gradGain, Cut(dx, part), accumulate: true));
            return [.. sums, dx.Read()];
        };
    }

    private static Matrix[] Accumulated(
        Workbench bench, Matrix before, IReadOnlyList<Part> parts, Action<Part, DeviceTensor> operation)
    {
        Operand gradient = bench.Accumulator(before);
        foreach (Part part in parts)
        {
            operation(part, gradient.Tensor);
        }

        return [gradient.Read()];
    }
}
