using System.Diagnostics;
using FlexLLM.KvCache;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.KvCache;

[TestFixture]
internal sealed class BlockTableTests
{
    [TestCase(0, 0)]
    [TestCase(1, 1)]
    [TestCase(16, 1)]
    [TestCase(17, 2)]
    [TestCase(int.MaxValue, 134_217_728)]
    public void BlocksFor_Tokens_RoundsUp(int tokens, int blocks) =>
        Assert.That(BlockTable.BlocksFor(tokens), Is.EqualTo(blocks));

    [Test]
    public void EnsureCapacity_Grows_KeepsEarlierBlocksInPlace()
    {
        var pool = new BlockPool(8);
        var table = new BlockTable();

        Assert.That(table.EnsureCapacity(20, pool), Is.True);
        int[] before = table.Blocks[..table.Count];
        Assert.That(table.EnsureCapacity(70, pool), Is.True);

        Assert.That(table.Count, Is.EqualTo(5));
        Assert.That(table.Blocks[..2], Is.EqualTo(before));
        Assert.That(table.Blocks[table.Count..], Is.All.EqualTo(-1));
        Assert.That(table.TokenCapacity, Is.EqualTo(80));
    }

    [Test]
    public void EnsureCapacity_TooFewFree_TakesNothing()
    {
        var pool = new BlockPool(3);
        var table = new BlockTable();
        table.EnsureCapacity(16, pool);

        Assert.That(table.EnsureCapacity(16 * 4, pool), Is.False);
        Assert.That(table.Count, Is.EqualTo(1));
        Assert.That(pool.BlocksFree, Is.EqualTo(2));
        Assert.That(table.EnsureCapacity(16 * 3, pool), Is.True);
    }

    [Test]
    public void EnsureCapacity_FewerTokens_KeepsBlocks()
    {
        var pool = new BlockPool(3);
        var table = new BlockTable();
        table.EnsureCapacity(48, pool);

        Assert.That(table.EnsureCapacity(1, pool), Is.True);
        Assert.That(table.Count, Is.EqualTo(3));
    }

    [Test]
    public void Release_Table_ReturnsAllAndCanStartOver()
    {
        var pool = new BlockPool(4);
        var table = new BlockTable();
        table.EnsureCapacity(64, pool);
        int[] first = table.Blocks[..table.Count];

        table.Release(pool);

        Assert.That(pool.BlocksFree, Is.EqualTo(4));
        Assert.That(table.Count, Is.Zero);
        Assert.That(table.EnsureCapacity(64, pool), Is.True);
        Assert.That(table.Blocks[..table.Count], Is.EqualTo(first), "the same calls give the same blocks");
    }

    [Test]
    public void Release_IntoAnotherPool_BreaksInvariant()
    {
        var table = new BlockTable();
        table.EnsureCapacity(1, new BlockPool(1));

        Assert.That(() => table.Release(new BlockPool(1)), Throws.TypeOf<UnreachableException>());
    }

    [Test]
    public void RandomTables_NeverShareABlock_AndConserveThePool([Range(1, 20)] int seed)
    {
        var random = new SeededRandom((ulong)seed);
        var pool = new BlockPool(random.Next(1, 60));
        BlockTable[] tables = [.. Enumerable.Range(0, 6).Select(_ => new BlockTable())];
        for (int i = 0; i < 500; i++)
        {
            BlockTable table = tables[random.Next(tables.Length)];
            if (random.Next(4) == 0)
            {
                table.Release(pool);
            }
            else
            {
                int tokens = random.Next(400);
                int needed = BlockTable.BlocksFor(tokens);
                bool fits = needed - table.Count <= pool.BlocksFree;
                int expected = fits ? Math.Max(needed, table.Count) : table.Count;
                Assert.That(table.EnsureCapacity(tokens, pool), Is.EqualTo(fits));
                Assert.That(table.Count, Is.EqualTo(expected));
            }

            int[] held = [.. tables.SelectMany(t => t.Blocks[..t.Count])];
            Assert.That(Conserved(held, pool), Is.True);
        }
    }

    [Test]
    public void Conserved_SharedBlock_IsDetected()
    {
        var pool = new BlockPool(4);
        pool.Allocate();
        pool.Allocate();

        Assert.That(Conserved([0, 1], pool), Is.True);
        Assert.That(Conserved([0, 0], pool), Is.False);
        Assert.That(Conserved([0], pool), Is.False);
    }

    private static bool Conserved(int[] held, BlockPool pool) =>
        held.Distinct().Count() == held.Length &&
        held.Length == pool.BlocksHeld &&
        pool.BlocksFree + held.Length == pool.BlocksTotal;
}
