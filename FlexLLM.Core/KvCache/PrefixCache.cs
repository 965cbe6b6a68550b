using System.Runtime.CompilerServices;
using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.KvCache;

/// <summary>
/// The way of one sequence through a <see cref="PrefixCache"/>: the blocks that hold its first tokens, as far as they are known.
/// </summary>
/// <param name="root">
/// What keys and values depend on besides tokens: the version of an adapter, or null for the bare model. Compared by reference.
/// </param>
internal sealed class PrefixPath(object? root)
{
    private readonly List<Place> _places = [];

    public object? Root => root;

    /// <summary>Blocks that hold the first tokens, each of them full.</summary>
    public int Count => _places.Count;

    /// <summary>Hash of the tokens in them and of the root.</summary>
    public ulong Hash => Count == 0 ? (ulong)(root is null ? 0 : RuntimeHelpers.GetHashCode(root)) : _places[^1].Hash;

    public int Block(int index) => _places[index].Block;

    public int LastBlock => Count == 0 ? -1 : _places[^1].Block;

    /// <summary>Whether the tokens of the next block collided with others of the same hash: from there on nothing is shared.</summary>
    public bool IsClosed { get; set; }

    public void Add(int block, long generation, ulong hash) => _places.Add(new Place(block, generation, hash));

    public void RemoveLast()
    {
        _places.RemoveAt(Count - 1);
        IsClosed = false;
    }

    public long LastGeneration => _places[^1].Generation;

    private readonly record struct Place(int Block, long Generation, ulong Hash);
}

/// <summary>
/// Finds the blocks of a KV cache that hold the keys and values of the first tokens of a sequence, computed for another or for
/// itself before a preemption. A tree: a block follows the block of the 16 tokens before it. Contents are compared, not only
/// hashes. Requests of another adapter, or of another version of it, share nothing.
/// </summary>
/// <remarks>
/// Who holds a block holds all before it, and gives them back last first. So what the pool drops first, the longest idle, never has a
/// successor that is still known.
/// </remarks>
internal sealed class PrefixCache
{
    private const int BlockTokens = DeviceKvCache.TokensPerBlock;

    private readonly BlockPool _pool;
    private readonly Dictionary<ulong, int> _byHash = [];
    private Node[] _nodes = [];
    private int[] _tokens = [];
    private long _generation;

    public PrefixCache(BlockPool pool)
    {
        _pool = pool;
        pool.OnDropped = Forget;
    }

    /// <summary>Blocks known.</summary>
    public int Count => _byHash.Count;

    /// <summary>
    /// Brings a path up to date that holds nothing: leaves out what was dropped, adds what has become known, but never the last token,
    /// whose row tells the next one.
    /// </summary>
    public void Match(PrefixPath path, ReadOnlySpan<int> tokens)
    {
        while (path.Count > 0 &&
            (path.Count * BlockTokens >= tokens.Length || _nodes[path.LastBlock].Generation != path.LastGeneration))
        {
            path.RemoveLast();
        }

        while ((path.Count + 1) * BlockTokens < tokens.Length)
        {
            ReadOnlySpan<int> next = tokens.Slice(path.Count * BlockTokens, BlockTokens);
            ulong hash = HashOf(path.Hash, next);
            int block = Find(path, hash, next);
            if (block < 0)
            {
                return;
            }

            path.Add(block, _nodes[block].Generation, hash);
        }
    }

    /// <summary>Of the blocks of a path that holds nothing, those that somebody else holds; they come first.</summary>
    public int HeldOf(PrefixPath path)
    {
        int held = path.Count;
        while (held > 0 && !_pool.IsHeld(path.Block(held - 1)))
        {
            held--;
        }

        return held;
    }

    /// <summary>Gives a sequence without blocks those of its path.</summary>
    public void Adopt(PrefixPath path, BlockTable table)
    {
        Check.That(table.Count == 0);
        for (int i = 0; i < path.Count; i++)
        {
            table.Share(path.Block(i), _pool);
        }
    }

    /// <summary>
    /// Makes known the blocks of a sequence that have become full. Where the same tokens are known already, its own block is given back
    /// for the known one.
    /// </summary>
    public void Publish(PrefixPath path, ReadOnlySpan<int> tokens, int computed, BlockTable table)
    {
        while (!path.IsClosed && (path.Count + 1) * BlockTokens <= computed)
        {
            int index = path.Count;
            ReadOnlySpan<int> next = tokens.Slice(index * BlockTokens, BlockTokens);
            ulong hash = HashOf(path.Hash, next);
            int block = Find(path, hash, next);
            if (block >= 0)
            {
                table.Replace(index, block, _pool);
            }
            else if (_byHash.ContainsKey(hash))
            {
                path.IsClosed = true;
                return;
            }
            else
            {
                block = table.Blocks[index];
                Learn(block, path, hash, next);
            }

            path.Add(block, _nodes[block].Generation, hash);
        }
    }

    private int Find(PrefixPath path, ulong hash, ReadOnlySpan<int> tokens)
    {
        if (!_byHash.TryGetValue(hash, out int block))
        {
            return -1;
        }

        ref Node node = ref _nodes[block];
        bool isSame = node.Parent == path.LastBlock && ReferenceEquals(node.Root, path.Root) && TokensOf(block).SequenceEqual(tokens);
        return isSame ? block : -1;
    }

    private void Learn(int block, PrefixPath path, ulong hash, ReadOnlySpan<int> tokens)
    {
        if (block >= _nodes.Length)
        {
            int count = Math.Max(_pool.BlocksTotal, block + 1);
            Array.Resize(ref _nodes, count);
            Array.Resize(ref _tokens, count * BlockTokens);
        }

        _nodes[block] = new Node(path.Root, path.LastBlock, hash, ++_generation);
        tokens.CopyTo(TokensOf(block));
        _byHash.Add(hash, block);
        _pool.Keep(block);
    }

    private void Forget(int block)
    {
        Check.That(_byHash.Remove(_nodes[block].Hash));
        _nodes[block] = default;
    }

    private Span<int> TokensOf(int block) => _tokens.AsSpan(block * BlockTokens, BlockTokens);

    // FNV-1a over words, with a last mixing step; any hash would do, contents are compared.
    private static ulong HashOf(ulong before, ReadOnlySpan<int> tokens)
    {
        ulong hash = before ^ 0xCBF29CE484222325;
        foreach (int token in tokens)
        {
            hash = (hash ^ (uint)token) * 0x100000001B3;
        }

        hash ^= hash >> 32;
        return hash * 0x9E3779B97F4A7C15;
    }

    // A path names a block by its generation too: the block may have been dropped and be another's by now. 0 is nobody's.
    private readonly record struct Node(object? Root, int Parent, ulong Hash, long Generation);
}
