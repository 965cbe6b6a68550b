using System.Diagnostics;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>Replay, block conservation and freedom from starvation, on the engine's own loop.</summary>
[TestFixture]
[Parallelizable]
internal sealed class EngineLawTests
{
    // More than the machine can answer, with a cache for about a dozen requests.
    private static readonly Scenario Overload = new()
    {
        Workload = new Workload { Requests = 60, RequestsPerSecond = 60.0, AnswerMean = 300 },
        Jobs = 2,
        Samples = 6,
        Epochs = 1,
        KvTokens = 4 * 1024,
    };

    [Test]
    public void Replay_SameSeed_SameLog()
    {
        string first = LogOf(seed: 1);

        Assert.That(LogOf(seed: 1), Is.EqualTo(first));
        Assert.That(LogOf(seed: 2), Is.Not.EqualTo(first));

        static string LogOf(ulong seed)
        {
            using EngineSimulation run = new EngineSimulation(Overload with { KvTokens = 32 * 1024 }, seed).Run();
            return run.LogHash();
        }
    }

    [Test]
    public void NoStarvation_OverloadWithFewBlocks_EverythingEnds([Range(1, 2)] int seed)
    {
        using EngineSimulation run = new EngineSimulation(Overload, (ulong)seed).Run();

        TestContext.Out.WriteLine($"{run.Steps.Count} steps, {run.Loop.Counters.Preemptions} preemptions");
        Assert.That(run.Loop.Counters.Preemptions, Is.GreaterThan(0), "else this load proves little");
        Assert.That(run.Requests, Has.Count.EqualTo(Overload.Workload.Requests));
        Assert.That(run.Requests.All(r => r.IsDone && r.Sequence.Generated == r.Arrival.AnswerTokens), Is.True);
        Assert.That(run.Jobs.Select(j => j.Result.Latest.Status), Is.All.EqualTo(FinetuningStatus.Completed));
        Assert.That(run.Jobs.All(j => j.Result.Completion.IsCompletedSuccessfully), Is.True);
    }

    // The same load where most of a prompt is one of three texts: all laws hold, and more is answered.
    [Test]
    public void SharedBeginnings_OverloadWithFewBlocks_EverythingEndsSooner([Range(1, 2)] int seed)
    {
        Scenario alike = Overload with { Workload = Overload.Workload with { BeginningTokens = 400, PromptMean = 500 } };
        using EngineSimulation shared = new EngineSimulation(alike, (ulong)seed).RunRequests();
        using EngineSimulation alone = new EngineSimulation(alike with { PrefixCaching = false }, (ulong)seed).RunRequests();

        TestContext.Out.WriteLine(
            $"{shared.Now} and {alone.Now}; {shared.Loop.Counters.TokensReused} tokens; {shared.Loop.Counters.Preemptions} preemptions");
        Assert.That(shared.Requests.All(r => r.IsDone && r.Sequence.Generated == r.Arrival.AnswerTokens), Is.True);
        Assert.That(shared.Loop.Counters.TokensReused, Is.GreaterThan(alike.Workload.Requests * 200));
        Assert.That(shared.Now, Is.LessThan(alone.Now));
        Assert.That(shared.Loop.BlocksHeld, Is.Zero);
    }

    [Test]
    public void BlockConservation_Drained_NoneHeld()
    {
        using EngineSimulation run = new EngineSimulation(Overload, 4).Run(); // Checks after every step.

        Assert.That(run.Loop.BlocksHeld, Is.Zero);
        Assert.That(run.Requests.Sum(r => r.Sequence.Blocks.Count), Is.Zero);
    }

    [Test]
    public void BlockConservation_Control_ForgottenRequestIsFound()
    {
        using EngineSimulation run = new EngineSimulation(Overload, 4).Run(s => s.Loop.RunningCount > 3);
        SimulatedRequest[] all = [.. run.Requests.Where(r => !r.IsDone && r.Submitted.IsCompleted)];
        SimulatedRequest holder = all.First(r => r.Sequence.Blocks.Count > 0);

        Assert.That(() => EngineSimulation.CheckBlocks(run.Loop, all), Throws.Nothing);
        Assert.That(
            () => EngineSimulation.CheckBlocks(run.Loop, all.Where(r => r != holder)), Throws.TypeOf<UnreachableException>());
    }

    // Jobs come and go on a device that has no room for them beside the cache, under more requests than it can answer.
    [Test]
    public void Budget_TooSmallForJobsBesideTheCache_LendsBlocksAndLosesNone([Range(1, 3)] int seed)
    {
        Scenario tight = Overload with { KvTokens = 56 * 1024 };
        using (var engine = new EngineSimulation(tight with { Jobs = 0 }, (ulong)seed))
        {
            tight = tight with { DeviceBytesMax = engine.Backend.AllocatedBytes };
        }

        var sizes = new SortedSet<int>();
        using EngineSimulation run = new EngineSimulation(tight, (ulong)seed).Run(s =>
        {
            Check.That(s.Backend.AllocatedBytes <= tight.DeviceBytesMax, "the budget");
            sizes.Add(s.Loop.BlocksTotal); // Checks the blocks after every step.
            return false;
        });

        TestContext.Out.WriteLine($"{string.Join(' ', sizes)} blocks, {run.Loop.Counters.Preemptions} preemptions");
        Assert.That(sizes.Max, Is.EqualTo(run.Loop.BlocksMax));
        Assert.That(sizes, Has.Count.GreaterThan(1));
        Assert.That(run.Requests.All(r => r.IsDone && r.Sequence.Generated == r.Arrival.AnswerTokens), Is.True);
        Assert.That(run.Jobs.Select(j => j.Result.Latest.Status), Is.All.EqualTo(FinetuningStatus.Completed));
    }

    [Test]
    public void Memory_EngineDisposed_NothingIsHeld()
    {
        EngineSimulation run = new EngineSimulation(Overload, 5).Run(s => s.Steps.Count == 40);
        Assert.That(run.Backend.AllocatedBytes, Is.GreaterThan(0));

        run.Dispose();

        Assert.That(run.Backend.AllocatedBytes, Is.Zero);
    }
}
