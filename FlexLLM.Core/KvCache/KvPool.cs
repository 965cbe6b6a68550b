using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.KvCache;

/// <summary>
/// A KV cache and the pool of its blocks, of one size, which changes between steps: finetuning takes whole extents from the
/// end and gives them back.
/// </summary>
internal sealed class KvPool : IDisposable
{
    private readonly IComputeBackend _backend;

    /// <param name="backend">The device.</param>
    /// <param name="model">Shape of keys and values.</param>
    /// <param name="blocks">Blocks at first, and the most there will be.</param>
    /// <param name="sharesPrefixes">Whether sequences that begin alike share blocks, also one after the other.</param>
    public KvPool(IComputeBackend backend, ModelConfig model, int blocks, bool sharesPrefixes = false)
    {
        Check.That(blocks > 0);
        _backend = backend;
        BlocksMax = blocks;
        BlockBytes = backend.KvCacheBytes(model.LayerCount, 1, model.KeyValueHeads, model.HeadDim);
        Blocks = new BlockPool(blocks);
        Prefixes = sharesPrefixes ? new PrefixCache(Blocks) : null;
        Cache = backend.CreateKvCache(model.LayerCount, blocks, model.KeyValueHeads, model.HeadDim);
    }

    public BlockPool Blocks { get; }

    /// <summary>Null where nothing is shared.</summary>
    public PrefixCache? Prefixes { get; }

    public DeviceKvCache Cache { get; }

    /// <summary>Blocks when nothing is lent.</summary>
    public int BlocksMax { get; }

    public long BlockBytes { get; }

    /// <summary>The smallest size that holds so many blocks: whole extents, or all there is.</summary>
    public int SizeFor(int blocks)
    {
        Check.That(blocks <= BlocksMax);
        const int extent = DeviceKvCache.BlocksPerExtent;
        return Math.Min(BlocksMax, (blocks + extent - 1) / extent * extent);
    }

    /// <summary>The largest size that leaves so many bytes to others, or takes as many more where negative; -1 for none.</summary>
    public int SizeWithout(long bytes)
    {
        long taken = bytes > 0 ? (bytes + BlockBytes - 1) / BlockBytes : bytes / BlockBytes;
        long blocks = Blocks.BlocksTotal - taken;
        const int extent = DeviceKvCache.BlocksPerExtent;
        return blocks >= BlocksMax ? BlocksMax : blocks < 0 ? -1 : (int)(blocks / extent) * extent;
    }

    /// <summary>Grows or shrinks to a size of <see cref="SizeFor"/>. Nobody may hold a block behind it.</summary>
    public void Resize(int blocks)
    {
        Check.That(blocks == SizeFor(blocks));
        if (blocks < Blocks.BlocksTotal)
        {
            int before = Blocks.BlocksTotal;
            Blocks.Shrink(blocks);
            try
            {
                _backend.ResizeKvCache(Cache, blocks);
            }
            catch (OutOfMemoryException)
            {
                // Moving to a smaller place may need memory for a moment; the cache has its blocks then, empty ones.
                Blocks.Grow(before);
                throw;
            }
        }
        else
        {
            _backend.ResizeKvCache(Cache, blocks);
            Blocks.Grow(blocks);
        }

        Check.That(Blocks.BlocksTotal == Cache.Blocks);
    }

    public void Dispose() => Cache.Dispose();
}
