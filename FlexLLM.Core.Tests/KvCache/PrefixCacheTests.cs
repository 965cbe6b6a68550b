using FlexLLM.KvCache;
using FsCheck;
using FsCheck.Fluent;
using NUnit.Framework;
using static FlexLLM.Tests.KvCache.RandomCalls;

namespace FlexLLM.Tests.KvCache;

/// <summary>What a sequence finds is what was computed for its own tokens, whoever comes, goes and is dropped meanwhile.</summary>
[TestFixture]
internal sealed class PrefixCacheTests
{
    private static readonly object Adapter = new();

    private static readonly Config Many = Repeatable.Many(seed: 11);

    private static Arbitrary<(int What, int Number)[]> Calls { get; } = RandomCalls.Of(last: 7);

    [Test]
    public void Match_AnyCalls_FindsOnlyItsOwnTokens() =>
        FsCheck.Check.One(Many, Prop.ForAll(Calls, calls => new Rig().Agrees(calls)));

    [Test]
    public void Match_Control_CacheThatForgetsNothing_IsFound() => Assert.That(
        () => FsCheck.Check.One(Many, Prop.ForAll(Calls, calls => new Rig(forgets: false).Agrees(calls))), Throws.Exception);

    [Test]
    public void Match_AfterTheFirstEnded_FindsWholeBlocksButNotTheLastToken([Values(1, 16, 17, 32, 33, 40)] int tokens)
    {
        var pool = new BlockPool(8);
        var cache = new PrefixCache(pool);
        Serve(cache, pool, null, 40).Release(pool);
        var path = new PrefixPath(null);
        cache.Match(path, Ids(tokens));

        Assert.That(path.Count, Is.EqualTo((tokens - 1) / 16));
        Assert.That(cache.HeldOf(path), Is.Zero);
        Assert.That((pool.BlocksFree, pool.BlocksIdle, pool.BlocksHeld), Is.EqualTo((8, 2, 0)));
    }

    [Test]
    public void Match_OfAnotherAdapter_FindsNothing()
    {
        var pool = new BlockPool(8);
        var cache = new PrefixCache(pool);
        Serve(cache, pool, Adapter, 40);
        foreach (object? root in new[] { null, new object(), Adapter })
        {
            var path = new PrefixPath(root);
            cache.Match(path, Ids(40));
            Assert.That(path.Count, Is.EqualTo(root == Adapter ? 2 : 0));
        }
    }

    [Test]
    public void Publish_TokensThatAreKnown_GivesItsOwnBlocksBack()
    {
        var pool = new BlockPool(8);
        var cache = new PrefixCache(pool);
        BlockTable[] tables = [new(), new()];
        foreach (BlockTable table in tables)
        {
            table.EnsureCapacity(40, pool); // Both are computed before either is known.
        }

        foreach (BlockTable table in tables)
        {
            cache.Publish(new PrefixPath(null), Ids(40), 40, table);
        }

        Assert.That(tables[1].Blocks[..3], Is.EqualTo(new[] { 0, 1, 5 }));
        Assert.That((pool.BlocksHeld, tables[0].SharedOf(pool), tables[1].SharedOf(pool)), Is.EqualTo((4, 2, 2)));
        tables[0].Release(pool);
        Assert.That((pool.BlocksHeld, tables[1].SharedOf(pool)), Is.EqualTo((3, 0)));
    }

    [Test]
    public void Allocate_NothingEmpty_DropsTheLongestIdleFromItsEnd()
    {
        var pool = new BlockPool(4);
        var cache = new PrefixCache(pool);
        BlockTable old = Serve(cache, pool, null, 32);
        BlockTable young = Serve(cache, pool, Adapter, 32);
        old.Release(pool);
        young.Release(pool);

        Assert.That(new[] { pool.Allocate(), pool.Allocate(), pool.Allocate() }, Is.EqualTo(new[] { 1, 0, 3 }));
        Assert.That(cache.Count, Is.EqualTo(1));
        var path = new PrefixPath(Adapter);
        cache.Match(path, Ids(40));
        Assert.That(path.Count, Is.EqualTo(1), "the beginning is kept the longest");
    }

    private static BlockTable Serve(PrefixCache cache, BlockPool pool, object? root, int tokens)
    {
        var table = new BlockTable();
        table.EnsureCapacity(tokens, pool);
        cache.Publish(new PrefixPath(root), Ids(tokens), tokens, table);
        return table;
    }

    private static int[] Ids(int count) => [.. Enumerable.Range(0, count)];

    /// <summary>A small pool, few beginnings, and a note in each block of what was computed into it.</summary>
    private sealed class Rig
    {
        private readonly BlockPool _pool = new(20);
        private readonly PrefixCache _cache;
        private readonly string[] _notes = new string[400];
        private readonly List<Sequence> _waiting = [];
        private readonly List<Sequence> _running = [];

        public Rig(bool forgets = true)
        {
            _cache = new PrefixCache(_pool);
            if (!forgets)
            {
                _pool.OnDropped = null;
            }
        }

        public bool Agrees((int What, int Number)[] calls)
        {
            foreach ((int what, int number) in calls)
            {
                switch (what)
                {
                    case 0 or 1:
                        _waiting.Add(new Sequence(number));
                        break;
                    case 2 or 3 when _waiting.Count > 0:
                        Admit(_waiting[number % _waiting.Count], number / 7);
                        break;
                    case 4 when _running.Count > 0:
                        Compute(_running[number % _running.Count], number / 7);
                        break;
                    case 5 when _running.Count > 0:
                        Stop(_running[number % _running.Count], isDone: number % 2 == 0);
                        break;
                    case 6:
                        int held = Enumerable.Range(0, _pool.BlocksTotal).LastOrDefault(_pool.IsHeld, -1) + 1;
                        _pool.Shrink(held + (number % (_pool.BlocksTotal - held + 1)));
                        break;
                    case 7:
                        _pool.Grow(Math.Min(20, _pool.BlocksTotal + (number % 9)));
                        break;
                }

                foreach (Sequence sequence in _waiting)
                {
                    _cache.Match(sequence.Path, sequence.Tokens);
                    Require(sequence.Path.Count * 16 < sequence.Tokens.Length, "the last token is left to compute");
                    CheckNotes(sequence, sequence.Path.Count, sequence.Path.Block);
                }

                foreach (Sequence sequence in _running)
                {
                    CheckNotes(sequence, sequence.Computed / 16, b => sequence.Table.Blocks[b]);
                }

                int[] blocks = [.. _running.SelectMany(s => s.Table.Blocks[..s.Table.Count])];
                Require(blocks.Distinct().Count() == _pool.BlocksHeld, "who is held");
                Require(blocks.All(b => _pool.HoldersOf(b) == blocks.Count(other => other == b)), "by how many");
                Require(_cache.Count >= _pool.BlocksIdle && _pool.BlocksFree + _pool.BlocksHeld == _pool.BlocksTotal, "counts");
            }

            return true;
        }

        private void Admit(Sequence sequence, int number)
        {
            int needed = BlockTable.BlocksFor(sequence.Tokens.Length) - _cache.HeldOf(sequence.Path);
            if (needed > _pool.BlocksFree)
            {
                return;
            }

            _cache.Adopt(sequence.Path, sequence.Table);
            sequence.Computed = sequence.Path.Count * 16;
            Require(sequence.Table.EnsureCapacity(sequence.Tokens.Length, _pool), "what was free is had");
            _waiting.Remove(sequence);
            _running.Add(sequence);
            Compute(sequence, number);
        }

        private void Compute(Sequence sequence, int number)
        {
            int computed = sequence.Computed + (number % (sequence.Tokens.Length - sequence.Computed + 1));
            for (int b = sequence.Computed / 16; b < computed / 16; b++)
            {
                _notes[sequence.Table.Blocks[b]] = sequence.NoteOf(b);
            }

            sequence.Computed = computed;
            _cache.Publish(sequence.Path, sequence.Tokens, computed, sequence.Table);
        }

        private void Stop(Sequence sequence, bool isDone)
        {
            sequence.Table.Release(_pool);
            sequence.Computed = 0;
            _running.Remove(sequence);
            if (!isDone)
            {
                _waiting.Add(sequence);
            }
        }

        private void CheckNotes(Sequence sequence, int blocks, Func<int, int> blockAt)
        {
            for (int b = 0; b < blocks; b++)
            {
                Require(_notes[blockAt(b)] == sequence.NoteOf(b), "what it finds is what was computed for its tokens");
            }
        }
    }

    /// <summary>One of few beginnings, and from some place on one of few ends.</summary>
    private sealed class Sequence
    {
        public Sequence(int number)
        {
            int split = number / 6 % 70;
            Tokens = [.. Enumerable.Range(0, 17 + (number / 500 % 80)).Select(i => i < split ? number % 2 : 2 + (number / 2 % 3))];
            Path = new PrefixPath(number % 5 == 0 ? Adapter : null);
        }

        public int[] Tokens { get; }

        public PrefixPath Path { get; }

        public BlockTable Table { get; } = new();

        public int Computed { get; set; }

        public string NoteOf(int block) => $"{Path.Root is null} {string.Join(' ', Tokens[..((block + 1) * 16)])}";
    }
}
