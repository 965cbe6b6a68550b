using FlexLLM.Engine;
using FlexLLM.Scheduling;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>The profile of a machine that is the slower of two lines, before any real step.</summary>
[TestFixture]
[Parallelizable]
internal sealed class LatencyProfilerTests
{
    private const int Steps = 300;

    [Test]
    public void Profile_HeldOutSteps_ArePredictedClosely()
    {
        using var run = new EngineSimulation(new Scenario { Workload = Workload.None, Jobs = 0 }, 1);

        LatencyErrorReport profiled = new HeldOutSteps(run.Loop.Timer()).Measure(run.Loop.Latency, Steps, seed: 3, learns: false);
        LatencyErrorReport guessed = new HeldOutSteps(run.Loop.Timer()).Measure(LatencyModel.Default, Steps, seed: 3, learns: false);

        TestContext.Out.WriteLine($"{profiled}\nwithout a profile {guessed}\nprofiled in {run.Start.TotalSeconds:F2} s");
        Assert.That(profiled.Median, Is.LessThan(0.06));
        Assert.That(profiled.P95, Is.LessThan(0.3));
        Assert.That(guessed.Median, Is.GreaterThan(0.2), "the control");
    }

    [Test]
    public void Profile_LittleTime_IsKeptAndStillMeasuresFinetuning()
    {
        using var run = new EngineSimulation(new Scenario { Workload = Workload.None, Jobs = 0 }, 1);
        TimeSpan before = run.Loop.Now;
        long bytes = run.Backend.AllocatedBytes;

        LatencyModel? model = new LatencyProfiler(run.Loop.Timer()).Profile(TimeSpan.FromSeconds(0.6));

        Assert.That(run.Loop.Now - before, Is.LessThan(TimeSpan.FromSeconds(0.7)), "a step under way is finished");
        Assert.That(run.Backend.AllocatedBytes, Is.EqualTo(bytes));
        run.Loop.Latency = model!.Value;
        LatencyErrorReport report = new HeldOutSteps(run.Loop.Timer()).Measure(model.Value, Steps, seed: 4, learns: false);
        TestContext.Out.WriteLine(report);
        Assert.That(report.Median, Is.LessThan(0.15));
    }

    [Test]
    public void Profile_NoTime_IsNull()
    {
        using var run = new EngineSimulation(new Scenario { Workload = Workload.None, Jobs = 0 }, 1);

        Assert.That(new LatencyProfiler(run.Loop.Timer()).Profile(TimeSpan.Zero), Is.Null);
    }
}
