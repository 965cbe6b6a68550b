using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Contracts;

/// <summary>Runs one operation over the rows [0, n) part by part, on fresh outputs, and returns those.</summary>
internal delegate Matrix[] SplitRun(IReadOnlyList<Part> parts);

/// <summary>Every operation in a form that can be cut: what its outputs hold must not depend on the cuts.</summary>
internal static partial class SplitOperations
{
    /// <summary>Operations so cheap that only very many rows keep several threads busy.</summary>
    public static readonly string[] Light =
    [
        "Gather", "RmsNorm", "RmsNorm of heads", "RmsNormBackward", "Rope", "SiluGate", "SiluGateBackward", "Add", "SgdStep",
        "AddBias", "AddColumnSums", "ScaleColumns", "ScaleColumnsBackward", "CopyColumns", "Relu", "ReluBackward", "Silu",
        "SiluBackward", "Pack BF16", "Pack SignBits",
    ];

    private const int Wide = 67;
    private const int Narrow = 37;
    private static readonly HeadShape Heads = new(KvHeads: 2, Group: 3, HeadDim: 10);

    /// <summary>Rows know nothing of each other: parts may come in any order.</summary>
    public static readonly Dictionary<string, Func<Workbench, int, SplitRun>> ByRows = new()
    {
        ["Gather"] = (bench, rows) =>
        {
            DeviceWeight table = bench.RandomWeight(19, Wide, DType.BF16).Weight;
            int[] ids = [.. Enumerable.Range(0, rows).Select(_ => bench.Chance.Next(19))];
            return Rows(bench, rows, Wide, (part, y) => bench.Backend.Gather(table, Cut(ids, part), y));
        },
        ["RmsNorm"] = (bench, rows) =>
        {
            (Operand x, DeviceTensor gain) = (Random(bench, rows, Wide), bench.Constant(bench.Random(1, Wide)));
            return Rows(bench, rows, Wide, (part, y) => bench.Backend.RmsNorm(Cut(x, part), gain, 1e-5f, y));
        },
        ["RmsNorm of heads"] = (bench, rows) =>
        {
            (Operand x, DeviceTensor gain) = (Random(bench, rows, 60), bench.Constant(bench.Random(1, 10)));
            return Rows(bench, rows, 60, (part, y) => bench.Backend.RmsNorm(Cut(x, part), gain, 1e-5f, y));
        },
        ["RmsNormBackward"] = (bench, rows) =>
        {
            (Operand x, Operand dy) = (Random(bench, rows, Wide), Random(bench, rows, Wide));
            DeviceTensor gain = bench.Constant(bench.Random(1, Wide));
            return Rows(bench, rows, Wide, (part, dx) =>
                bench.Backend.RmsNormBackward(Cut(x, part), gain, 1e-5f, Cut(dy, part), dx, accumulate: true));
        },
        ["Linear F32"] = (bench, rows) => Linear(bench, rows, 67, 300, DType.F32, accumulate: false),
        ["Linear BF16"] = (bench, rows) => Linear(bench, rows, 1100, 41, DType.BF16, accumulate: true),
        ["LinearBackwardInput F32"] = (bench, rows) => LinearBackwardInput(bench, rows, 41, 600, DType.F32, accumulate: true),
        ["LinearBackwardInput BF16"] = (bench, rows) => LinearBackwardInput(bench, rows, 300, 67, DType.BF16, accumulate: false),
        ["LoraBypass"] = LoraBypass,
        ["Narrow"] = NarrowFactor,
        ["Widen"] = WidenFactor,
        ["AddBias"] = AddBias,
        ["ScaleColumns"] = ScaleColumns,
        ["CopyColumns"] = CopyColumns,
        ["Relu"] = Relu,
        ["ReluBackward"] = ReluBackward,
        ["Silu"] = Silu,
        ["SiluBackward"] = SiluBackward,
        ["Pack BF16"] = (bench, rows) => PackAndUnpack(bench, rows, PackedFormat.BF16),
        ["Pack SignBits"] = (bench, rows) => PackAndUnpack(bench, rows, PackedFormat.SignBits),
        ["Rope"] = (bench, rows) =>
        {
            DeviceTensor table = bench.Constant(ReferenceTests.RotationTable(rows, 10));
            int[] positions = [.. Enumerable.Range(0, rows)];
            return Rows(bench, rows, 60, (part, x) => bench.Backend.Rope(x, Cut(positions, part), table, inverse: false));
        },
        ["SiluGate"] = (bench, rows) =>
        {
            (Operand gate, Operand up) = (Random(bench, rows, Wide), Random(bench, rows, Wide));
            return Rows(bench, rows, Wide, (part, y) => bench.Backend.SiluGate(Cut(gate, part), Cut(up, part), y));
        },
        ["SiluGateBackward"] = (bench, rows) =>
        {
            (Operand gate, Operand up) = (Random(bench, rows, Wide), Random(bench, rows, Wide));
            return Rows(bench, rows, Wide, (part, dy) =>
            {
                Operand dUp = bench.Output(part.Count, Wide);
                bench.Backend.SiluGateBackward(Cut(gate, part), Cut(up, part), dy, dy, dUp);
                bench.Backend.Add(dy, dUp, dy);
            });
        },
        ["Add"] = (bench, rows) =>
        {
            (Operand a, Operand b) = (Random(bench, rows, Wide), Random(bench, rows, Wide));
            return Rows(bench, rows, Wide, (part, y) => bench.Backend.Add(Cut(a, part), Cut(b, part), y));
        },
        ["Attention of many sequences"] = AttentionOfManySequences,
        ["Logits"] = (bench, rows) =>
        {
            (Operand x, DeviceWeight head) = (Random(bench, 9, Narrow), bench.RandomWeight(131, Narrow, DType.BF16).Weight);
            int[] chosen = [.. Enumerable.Range(0, rows).Select(_ => bench.Chance.Next(9))];
            return Rows(bench, rows, 131, (part, y) => bench.Backend.Logits(x, Cut(chosen, part), head, y));
        },
        ["FusedLinearCrossEntropy"] = CrossEntropy,
        ["SgdStep"] = (bench, rows) =>
        {
            Matrix gradient = bench.Random(rows, Wide);
            var options = new SgdStepOptions(0.1f, 0.9f, Nesterov: true, 0.01f);
            return Rows(bench, rows, Wide, (part, p) => OnTensors(bench, p, gradient.Slice(part.Start, part.Count),
                (parameter, g, moment) => bench.Backend.SgdStep(parameter, g, moment, options)));
        },
        ["AdamWStep"] = (bench, rows) =>
        {
            Matrix gradient = bench.Random(rows, Narrow);
            var options = new AdamWStepOptions(0.1f, 0.9f, 0.99f, 1e-8f, 0.01f, 3);
            return Rows(bench, rows, Narrow, (part, p) => OnTensors(bench, p, gradient.Slice(part.Start, part.Count),
                (parameter, g, moment) => bench.Backend.AdamWStep(
                    parameter, g, moment, bench.Accumulator(new Matrix(part.Count, Narrow)).Tensor, options)));
        },
    };

    /// <summary>A sequence grows: parts come in ascending order.</summary>
    public static readonly Dictionary<string, Func<Workbench, int, SplitRun>> FromTheStart = new()
    {
        ["AppendKv and Attention"] = Prefill,
    };

    /// <summary>Sums over tokens: parts come from the end.</summary>
    public static readonly Dictionary<string, Func<Workbench, int, SplitRun>> FromTheEnd = new()
    {
        ["LoraBypassBackward"] = LoraBypassBackward,
        ["AddOuter"] = AddOuter,
        ["AddColumnSums"] = AddColumnSums,
        ["ScaleColumnsBackward"] = ScaleColumnsBackward,
        ["AttentionBackward"] = AttentionBackward,
    };

    private static SplitRun Linear(
        Workbench bench, int rows, int inFeatures, int outFeatures, DType type, bool accumulate)
    {
        DeviceWeight weight = bench.RandomWeight(outFeatures, inFeatures, type).Weight;
        (Operand x, DeviceTensor bias) = (Random(bench, rows, inFeatures), bench.Constant(bench.Random(1, outFeatures)));
        return Rows(bench, rows, outFeatures, (part, y) => bench.Backend.Linear(Cut(x, part), weight, bias, y, accumulate));
    }

    private static SplitRun LinearBackwardInput(
        Workbench bench, int rows, int inFeatures, int outFeatures, DType type, bool accumulate)
    {
        DeviceWeight weight = bench.RandomWeight(outFeatures, inFeatures, type).Weight;
        Operand dy = Random(bench, rows, outFeatures);
        return Rows(bench, rows, inFeatures, (part, dx) =>
            bench.Backend.LinearBackwardInput(Cut(dy, part), weight, dx, accumulate));
    }

    // Runs of ten rows share an adapter; every fifth run has none.
    private static SplitRun LoraBypass(Workbench bench, int rows)
    {
        int[] ranks = [4, 20, 1, 8];
        (DeviceFactor A, DeviceFactor B)[] loras =
            [.. ranks.Select(rank => (bench.Factor(bench.Random(rank, Wide)), bench.Factor(bench.Random(rank, Narrow))))];
        Operand x = Random(bench, rows, Wide);
        return Rows(bench, rows, Narrow, (part, y) =>
        {
            var segments = new List<LoraSegment>();
            for (int row = part.Start; row < part.Start + part.Count;)
            {
                int end = Math.Min((row / 10 * 10) + 10, part.Start + part.Count);
                if (row / 10 % 5 < loras.Length)
                {
                    (DeviceFactor a, DeviceFactor b) = loras[row / 10 % 5];
                    segments.Add(new LoraSegment(row - part.Start, end - row, a, b, 0.7f));
                }

                row = end;
            }

            bench.Backend.LoraBypass(Cut(x, part), [.. segments], y);
        });
    }

    // Row i is a decode row of a sequence of its own.
    private static SplitRun AttentionOfManySequences(Workbench bench, int rows)
    {
        var cache = new PagedCache(bench, Heads, rows * 5);
        var sequences = new AttentionSegment[rows];
        for (int i = 0; i < rows; i++)
        {
            int positions = 1 + (i * 7 % 50);
            AttentionSegment all = cache.Append(
                bench.Random(positions, Heads.KvColumns), bench.Random(positions, Heads.KvColumns), 0);
            sequences[i] = all with { RowCount = 1, PositionStart = positions - 1 };
        }

        Operand q = Random(bench, rows, Heads.QueryColumns);
        return Rows(bench, rows, Heads.QueryColumns, (part, o) =>
        {
            AttentionSegment[] batch = Cut(sequences, part);
            for (int i = 0; i < batch.Length; i++)
            {
                batch[i] = batch[i] with { RowStart = i };
            }

            bench.Backend.Attention(Cut(q, part), o, 0, batch);
        });
    }

    private static SplitRun CrossEntropy(Workbench bench, int rows)
    {
        (Operand x, DeviceWeight head) = (Random(bench, rows, Narrow), bench.RandomWeight(131, Narrow, DType.BF16).Weight);
        int[] targets = [.. Enumerable.Range(0, rows).Select(_ => bench.Chance.Next(-1, 131))];
        return parts =>
        {
            Operand dx = bench.Output(rows, Narrow);
            Operand losses = bench.Output(rows, 1, TensorUse.Exact);
            foreach (Part part in parts)
            {
                bench.Backend.FusedLinearCrossEntropy(
                    Cut(x, part), Cut(targets, part), head, 0.3f, Cut(dx, part), Cut(losses, part));
            }

            return [dx.Read(), losses.Read()];
        };
    }

    // Every run takes other blocks: where positions lie must not matter either.
    private static SplitRun Prefill(Workbench bench, int rows)
    {
        (Operand k, Operand v) = (Random(bench, rows, Heads.KvColumns), Random(bench, rows, Heads.KvColumns));
        Operand q = Random(bench, rows, Heads.QueryColumns);
        return parts =>
        {
            var cache = new PagedCache(bench, Heads, 3 * (PagedCache.BlocksFor(rows) + 1));
            int[] table = cache.TakeTable(rows);
            Operand o = bench.Output(rows, Heads.QueryColumns);
            Operand logSumExp = bench.Accumulator(new Matrix(rows, Heads.QueryHeads));
            foreach (Part part in parts)
            {
                AttentionSegment[] segments =
                    [new AttentionSegment(0, part.Count, part.Start, cache.Device, table, logSumExp.Tensor)];
                bench.Backend.AppendKv(Cut(k, part), Cut(v, part), 1, segments);
                bench.Backend.Attention(Cut(q, part), Cut(o, part), 1, segments);
            }

            return [o.Read(), logSumExp.Read()];
        };
    }

    private static SplitRun LoraBypassBackward(Workbench bench, int rows)
    {
        (Matrix gradA, Matrix gradB, Matrix dx) =
            (bench.Random(9, Wide), bench.Random(9, Narrow), bench.Random(rows, Wide));
        (DeviceFactor a, DeviceFactor b) = (bench.Factor(bench.Random(9, Wide)), bench.Factor(bench.Random(9, Narrow)));
        (Operand x, Operand dy) = (Random(bench, rows, Wide), Random(bench, rows, Narrow));
        return parts =>
        {
            (Operand newA, Operand newB, Operand newDx) =
                (bench.Accumulator(gradA), bench.Accumulator(gradB), bench.Target(dx));
            foreach (Part part in parts)
            {
                bench.Backend.LoraBypassBackward(
                    Cut(x, part), Cut(dy, part), a, b, 0.7f, newA.Tensor, newB.Tensor, Cut(newDx, part));
            }

            return [newA.Read(), newB.Read(), newDx.Read()];
        };
    }

    private static SplitRun AttentionBackward(Workbench bench, int rows)
    {
        var cache = new PagedCache(bench, Heads, 2 * (PagedCache.BlocksFor(rows) + 1));
        (Operand q, Operand dO) = (Random(bench, rows, Heads.QueryColumns), Random(bench, rows, Heads.QueryColumns));
        (Matrix dK, Matrix dV) = (bench.Random(rows, Heads.KvColumns), bench.Random(rows, Heads.KvColumns));
        DeviceTensor logSumExp = bench.Accumulator(new Matrix(rows, Heads.QueryHeads)).Tensor;
        (Matrix k, Matrix v) = (bench.Random(rows, Heads.KvColumns), bench.Random(rows, Heads.KvColumns));
        AttentionSegment all = cache.Append(k, v, 0) with { LogSumExp = logSumExp };
        bench.Backend.Attention(q, bench.Output(rows, Heads.QueryColumns), 0, [all]);
        return parts =>
        {
            (Operand newDK, Operand newDV) = (bench.Accumulator(dK), bench.Accumulator(dV));
            Operand dQ = bench.Output(rows, Heads.QueryColumns);
            foreach (Part part in parts)
            {
                AttentionSegment window = all with { PositionStart = part.Start, RowCount = part.Count };
                bench.Backend.AttentionBackward(
                    Cut(q, part), Cut(dO, part), 0, window, Cut(dQ, part), newDK.Tensor, newDV.Tensor);
            }

            return [dQ.Read(), newDK.Read(), newDV.Read()];
        };
    }

    // The destination starts from the same random values on every run, so that in-place and adding operations fit too.
    private static SplitRun Rows(Workbench bench, int rows, int columns, Action<Part, TensorSlice> operation)
    {
        Matrix initial = bench.Random(rows, columns);
        return parts =>
        {
            Operand y = bench.Target(initial);
            foreach (Part part in parts)
            {
                operation(part, Cut(y, part));
            }

            return [y.Read()];
        };
    }

    // Optimizers take whole tensors.
    private static void OnTensors(
        Workbench bench, TensorSlice slice, Matrix gradient, Action<DeviceTensor, DeviceTensor, DeviceTensor> step)
    {
        DeviceTensor parameter = bench.Accumulator(gradient).Tensor;
        DeviceTensor moment = bench.Accumulator(gradient.Abs()).Tensor;
        bench.Backend.Copy(slice, parameter);
        step(parameter, bench.Constant(gradient), moment);
        bench.Backend.Add(parameter, moment, slice);
    }

    private static Operand Random(Workbench bench, int rows, int columns) => bench.Source(bench.Random(rows, columns));

    private static TensorSlice Cut(Operand operand, Part part) => operand.Slice(part.Start, part.Count);

    private static T[] Cut<T>(T[] items, Part part) => items[part.Start..(part.Start + part.Count)];
}
