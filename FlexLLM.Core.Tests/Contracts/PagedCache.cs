using FlexLLM.Backends;

namespace FlexLLM.Tests.Contracts;

/// <summary>
/// A KV cache whose every slot holds NaN until a sequence appends to it, and which hands out scattered blocks.
/// </summary>
internal sealed class PagedCache
{
    public const int Layers = 2;

    private readonly Workbench _bench;
    private readonly Stack<int> _free;

    public PagedCache(Workbench bench, HeadShape shape, int blocks)
    {
        (_bench, Shape) = (bench, shape);
        Device = bench.Own(bench.Backend.CreateKvCache(Layers, blocks, shape.KvHeads, shape.HeadDim));
        int[] order = [.. Enumerable.Range(0, blocks)];
        Matrix poison = Matrix.Filled(blocks * DeviceKvCache.TokensPerBlock, shape.KvColumns, double.NaN);
        Operand nan = bench.Source(poison);
        for (int layer = 0; layer < Layers; layer++)
        {
            bench.Backend.AppendKv(nan, nan, layer, [new AttentionSegment(0, poison.Rows, 0, Device, order)]);
        }

        bench.Chance.Shuffle<int>(order);
        _free = new Stack<int>(order);
    }

    public HeadShape Shape { get; }

    public DeviceKvCache Device { get; }

    public static int BlocksFor(int positions) =>
        (positions + DeviceKvCache.TokensPerBlock - 1) / DeviceKvCache.TokensPerBlock;

    /// <summary>Blocks for so many positions, and one spare block that stays NaN at the end of the table.</summary>
    public int[] TakeTable(int positions) =>
        [.. Enumerable.Range(0, BlocksFor(positions) + 1).Select(_ => _free.Pop())];

    /// <summary>A segment over a fresh table with positions [0, k.Rows) appended at <paramref name="layer"/>.</summary>
    public AttentionSegment Append(Matrix k, Matrix v, int layer, int[]? table = null)
    {
        var segment = new AttentionSegment(0, k.Rows, 0, Device, table ?? TakeTable(k.Rows));
        _bench.Backend.AppendKv(_bench.Source(k), _bench.Source(v), layer, [segment]);
        return segment;
    }
}
