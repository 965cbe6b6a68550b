using System.Diagnostics;
using FlexLLM.KvCache;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.KvCache;

[TestFixture]
internal sealed class BlockPoolTests
{
    [Test]
    public void Allocate_FreshPool_CountsUpFromZero()
    {
        var pool = new BlockPool(3);

        Assert.That(new[] { pool.Allocate(), pool.Allocate(), pool.Allocate() }, Is.EqualTo(new[] { 0, 1, 2 }));
        Assert.That(pool.BlocksFree, Is.Zero);
        Assert.That(pool.BlocksHeld, Is.EqualTo(3));
    }

    [Test]
    public void Allocate_AfterFree_ReturnsTheLowestFreeBlock()
    {
        var pool = new BlockPool(4);
        for (int i = 0; i < 4; i++)
        {
            pool.Allocate();
        }

        pool.Free(1);
        pool.Free(3);

        Assert.That(pool.Allocate(), Is.EqualTo(1));
        Assert.That(pool.Allocate(), Is.EqualTo(3));
    }

    [Test]
    public void Allocate_Exhausted_BreaksInvariant()
    {
        var pool = new BlockPool(1);
        pool.Allocate();

        Assert.That(() => pool.Allocate(), Throws.TypeOf<UnreachableException>());
    }

    [TestCase(-1)]
    [TestCase(2)]
    [TestCase(1, Description = "in range, never handed out")]
    public void Free_ForeignBlock_BreaksInvariant(int block)
    {
        var pool = new BlockPool(2);
        pool.Allocate();

        Assert.That(() => pool.Free(block), Throws.TypeOf<UnreachableException>());
    }

    [Test]
    public void Free_Twice_BreaksInvariant()
    {
        var pool = new BlockPool(2);
        int block = pool.Allocate();
        pool.Free(block);

        Assert.That(() => pool.Free(block), Throws.TypeOf<UnreachableException>());
    }

    [Test]
    public void RandomOperations_AgreeWithModel([Range(1, 20)] int seed)
    {
        Assert.That(() => Exercise((ulong)seed, static (pool, block) => pool.Free(block)), Throws.Nothing);
    }

    [Test]
    public void RandomOperations_LeakingFree_IsDetected()
    {
        Assert.That(() => Exercise(1, static (_, _) => { }), Throws.TypeOf<AssertionException>());
    }

    private static void Exercise(ulong seed, Action<BlockPool, int> free)
    {
        var random = new SeededRandom(seed);
        var pool = new BlockPool(random.Next(1, 40));
        var held = new List<int>();
        for (int i = 0; i < 2_000; i++)
        {
            bool allocates = held.Count == 0 || (held.Count < pool.BlocksTotal && random.Next(2) == 0);
            if (allocates)
            {
                int block = pool.Allocate();
                Expect(!held.Contains(block) && (uint)block < (uint)pool.BlocksTotal);
                held.Add(block);
            }
            else
            {
                int index = random.Next(held.Count);
                free(pool, held[index]);
                held.RemoveAt(index);
            }

            Expect(pool.BlocksHeld == held.Count && pool.BlocksFree == pool.BlocksTotal - held.Count);
        }
    }

    // Thrown directly: a failed NUnit assertion would be recorded even where the control expects it.
    private static void Expect(bool condition)
    {
        if (!condition)
        {
            throw new AssertionException("The pool and its model disagree.");
        }
    }
}
