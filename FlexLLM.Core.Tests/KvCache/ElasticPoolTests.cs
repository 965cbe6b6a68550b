using System.Diagnostics;
using FlexLLM.Backends;
using FlexLLM.Backends.Null;
using FlexLLM.Engine;
using FlexLLM.KvCache;
using FlexLLM.Models;
using FsCheck;
using FsCheck.Fluent;
using NUnit.Framework;
using static FlexLLM.Tests.KvCache.RandomCalls;

namespace FlexLLM.Tests.KvCache;

/// <summary>Properties of the block pool and of the budget under any sequence of calls.</summary>
[TestFixture]
internal sealed class ElasticPoolTests
{
    private const int Extent = DeviceKvCache.BlocksPerExtent;

    private static readonly Config Many = Repeatable.Many(seed: 7);

    private static Arbitrary<(int What, int Number)[]> Calls { get; } = RandomCalls.Of(last: 5);

    [Test]
    public void BlockPool_AnyCalls_ConservesBlocks() =>
        FsCheck.Check.One(Many, Prop.ForAll(Calls, calls => PoolAgrees(calls, (pool, total) => pool.Shrink(total))));

    [Test]
    public void BlockPool_Control_ShrinkThatForgets_IsFound() => Assert.That(
        () => FsCheck.Check.One(Many, Prop.ForAll(Calls, calls => PoolAgrees(calls, (_, _) => { }))), Throws.Exception);

    [Test]
    public void Shrink_BelowAHeldBlock_BreaksInvariant()
    {
        var pool = new BlockPool(20);
        for (int i = 0; i < 9; i++)
        {
            pool.Allocate();
        }

        for (int i = 0; i < 8; i++)
        {
            pool.Free(i);
        }

        Assert.That(() => pool.Shrink(8), Throws.TypeOf<UnreachableException>());
        Assert.That(() => new BlockPool(3).Shrink(4), Throws.TypeOf<UnreachableException>());
        Assert.That(() => new BlockPool(3).Grow(2), Throws.TypeOf<UnreachableException>());
    }

    [Test]
    public void Budget_AnyCalls_StaysWithinItsLimits() => FsCheck.Check.One(Many, Prop.ForAll(Calls, BudgetHolds));

    private static bool PoolAgrees((int What, int Number)[] calls, Action<BlockPool, int> shrink)
    {
        var pool = new BlockPool(70);
        var held = new SortedSet<int>();
        int total = 70;
        foreach ((int what, int number) in calls)
        {
            int[] free = [.. Enumerable.Range(0, total).Except(held)];
            switch (what)
            {
                case 0 or 1 or 2 when free.Length > 0:
                    int block = pool.Allocate();
                    Require(block == free[0], "the lowest free block");
                    held.Add(block);
                    break;
                case 3 when held.Count > 0:
                    int given = held.ElementAt(number % held.Count);
                    pool.Free(given);
                    held.Remove(given);
                    break;
                case 4:
                    int least = held.Count == 0 ? 0 : held.Max + 1;
                    total = least + (number % (total - least + 1));
                    shrink(pool, total);
                    break;
                case 5:
                    total += number % 100;
                    pool.Grow(total);
                    break;
            }

            Require(pool.BlocksTotal == total && pool.BlocksHeld == held.Count, "counts");
            Require(pool.BlocksFree == total - held.Count, "conservation");
            Require(Enumerable.Range(-1, total + 70).All(b => pool.IsHeld(b) == held.Contains(b)), "who is held");
        }

        return true;
    }

    // On a device that only counts: others take and give bytes, requests hold blocks, the cache gives way and grows back.
    private static bool BudgetHolds((int What, int Number)[] calls)
    {
        ModelConfig model = ModelShapes.Of("tiny");
        using var backend = new NullBackend(new NullMachine { FlopsPerSecond = 1, BytesPerSecond = 1e12 }, new ManualClock(), seed: 1);
        using var pool = new KvPool(backend, model, (5 * Extent) + 3);
        var others = new Stack<DeviceTensor>();
        var held = new HashSet<int>();
        int promised = 0;
        long bytesMax = backend.AllocatedBytes + (pool.BlockBytes / 3);
        var budget = new DeviceBudget(backend, pool, bytesMax, blocksMin: Extent + 1, () => promised, from =>
        {
            foreach (int block in held.Where(b => b >= from).ToArray())
            {
                pool.Blocks.Free(block);
                held.Remove(block);
            }
        }, relinquish: () => false);
        foreach ((int what, int number) in calls)
        {
            switch (what)
            {
                case 0 or 1:
                    long attainable = budget.BytesFree + budget.BytesLendable;
                    int bytes = sizeof(float) * (number % (int)(2 * Extent * pool.BlockBytes / sizeof(float)));
                    bool fits = budget.TryFree(bytes);
                    Require(fits == (bytes <= attainable), "taken as far as there is something to take");
                    Require(!fits || bytes <= budget.BytesFree, "what was promised is free");
                    if (fits)
                    {
                        others.Push(backend.Allocate(1, bytes / sizeof(float)));
                    }

                    break;
                case 2:
                    if (others.TryPop(out DeviceTensor? tensor))
                    {
                        tensor.Dispose();
                    }

                    break;
                case 3:
                    budget.GiveBack();
                    bool isFull = pool.Blocks.BlocksTotal == pool.BlocksMax;
                    Require(isFull || budget.BytesFree < Extent * pool.BlockBytes, "nothing that the cache could use is left over");
                    break;
                case 4:
                    for (int i = number % 20; i > 0 && pool.Blocks.BlocksFree > 0; i--)
                    {
                        held.Add(pool.Blocks.Allocate());
                    }

                    break;
                default:
                    promised = number % (pool.Blocks.BlocksTotal + 1);
                    break;
            }

            int total = pool.Blocks.BlocksTotal;
            Require(backend.AllocatedBytes <= bytesMax, "the limit");
            Require(total == pool.Cache.Blocks && total == pool.SizeFor(total), "whole extents");
            Require(total >= Extent + 1 && total >= promised, "the floor");
            Require(pool.Blocks.BlocksHeld == held.Count && held.All(b => b < total), "requests keep what they hold");
        }

        while (others.TryPop(out DeviceTensor? tensor))
        {
            tensor.Dispose();
        }

        budget.GiveBack();
        Require(pool.Blocks.BlocksTotal == pool.BlocksMax, "all comes back");
        return true;
    }
}
