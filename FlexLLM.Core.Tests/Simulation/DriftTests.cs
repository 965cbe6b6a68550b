using FlexLLM.Scheduling;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>
/// A machine that becomes half as fast while it serves, and fast again: targets hold again within fifty steps, and so does the speed of
/// finetuning. The same requests on the same machine without a job say what could be had.
/// </summary>
[TestFixture]
[Parallelizable]
internal sealed class DriftTests
{
    private const int StepsToRecover = 50;
    private const double ErrorBound = 0.1;
    private const int Seeds = 3;

    private static readonly Scenario Scenario = new() { Workload = new Workload { Requests = 120, RequestsPerSecond = 5.0 } };
    private static readonly TimeSpan Slows = TimeSpan.FromSeconds(8);
    private static readonly TimeSpan Recovers = TimeSpan.FromSeconds(16);
    private static readonly TimeSpan End = TimeSpan.FromSeconds(24);

    [Test]
    public void Attainment_TwiceAsSlow_IsBackWithinFiftySteps()
    {
        Outcome outcome = Measure(isFrozen: false);

        TestContext.Out.WriteLine(outcome);
        Assert.That(outcome.Surprise, Is.GreaterThan(1.5), "else nothing was disturbed");
        Assert.That(outcome.Requests, Is.GreaterThan(60));
        Assert.That(outcome.Trained, Is.GreaterThan(300), "steps with finetuning on the slow machine");
        Assert.That(outcome.Tpot, Is.GreaterThanOrEqualTo(outcome.TpotAlone - 0.01));
        Assert.That(outcome.Ttft, Is.GreaterThanOrEqualTo(outcome.TtftAlone - 0.01));
        Assert.That(outcome.OverBudget, Is.LessThan(0.01));
    }

    /// <summary>The control: a model that learns nothing from what it sees.</summary>
    [Test]
    public void Control_WithoutTheOnlineCorrection_AttainmentIsLost()
    {
        Outcome outcome = Measure(isFrozen: true);

        TestContext.Out.WriteLine(outcome);
        Assert.That(outcome.Tpot, Is.LessThan(outcome.TpotAlone - 0.02));
        Assert.That(outcome.OverBudget, Is.GreaterThan(0.2));
    }

    /// <summary>A model that stays too careful trains little less, for requests save what it does not spend: both are looked at.</summary>
    [Test]
    public void Finetuning_MachineAsFastAsBefore_IsBackWithinFiftySteps()
    {
        (double share, double careful) = MeasureBack(isFrozen: false);

        TestContext.Out.WriteLine($"{share:P1} of what a machine trains that was never slow; predicted {careful:F2} times what it took");
        Assert.That(share, Is.GreaterThan(0.97));
        Assert.That(careful, Is.InRange(1.0, 1.2));
        Assert.That(MeasureBack(isFrozen: true).Careful, Is.GreaterThan(1.5), "the control: without the online correction");
    }

    // What is trained after the recovery, over what is without any drift, and how long steps are thought to take.
    private static (double Share, double Careful) MeasureBack(bool isFrozen)
    {
        double share = 0.0;
        double careful = 0.0;
        for (ulong seed = 1; seed <= Seeds; seed++)
        {
            using EngineSimulation drifting = Run(seed, jobs: 1, Recovers, isSlow: true);
            LatencyModel believed = drifting.Loop.Latency;
            drifting.Backend.Slowdown = 1.0;
            drifting.Run(s => Keep(s, isFrozen ? believed : null) && s.Now >= End);
            using EngineSimulation steady = Run(seed, jobs: 1, End, isSlow: false);
            StepRecord[] after = [.. drifting.Steps.Where(s => s.Begun >= Recovers).Skip(StepsToRecover)];
            share += Trained(drifting, after[0].Begun) / Trained(steady, after[0].Begun) / Seeds;
            careful += after.Average(s => s.Plan.LatencyPredicted / s.Took) / Seeds;
        }

        return (share, careful);
    }

    private static Outcome Measure(bool isFrozen)
    {
        var later = new List<StepRecord>();
        var with = new List<SimulatedRequest>();
        var without = new List<SimulatedRequest>();
        double surprise = 0.0;
        for (ulong seed = 1; seed <= Seeds; seed++)
        {
            using EngineSimulation both = Run(seed, jobs: 1, Slows, isSlow: false);
            using EngineSimulation alone = Run(seed, jobs: 0, Slows, isSlow: false);
            LatencyModel believed = both.Loop.Latency;
            both.Backend.Slowdown = alone.Backend.Slowdown = 2.0;
            both.Run(s => Keep(s, isFrozen ? believed : null) && !s.HasRequests);
            alone.RunRequests();

            StepRecord[] after = [.. both.Steps.Where(s => s.Begun >= Slows)];
            surprise = Math.Max(surprise, after[0].Took / after[0].Plan.LatencyPredicted);
            later.AddRange(after.Skip(StepsToRecover));
            TimeSpan from = after[StepsToRecover].Begun;
            with.AddRange(both.Requests.Where(r => r.Arrival.Time - both.Start >= from));
            without.AddRange(alone.Requests.Where(r => r.Arrival.Time - alone.Start >= from));
        }

        Assert.That(with, Has.Count.EqualTo(without.Count));
        return new Outcome(
            surprise, with.Count, Share(with, r => r.MetTpot), Share(without, r => r.MetTpot), Share(with, r => r.MetTtft),
            Share(without, r => r.MetTtft), later.Count(s => s.Plan.HasFinetuning), EngineSimulation.OverBudget(later, ErrorBound));
    }

    private static EngineSimulation Run(ulong seed, int jobs, TimeSpan until, bool isSlow)
    {
        EngineSimulation run = new EngineSimulation(Scenario with { Jobs = jobs }, seed).Run(s => s.Now >= (isSlow ? Slows : until));
        run.Backend.Slowdown = isSlow ? 2.0 : 1.0;
        return run.Run(s => s.Now >= until);
    }

    // Before each step: takes back what the model has learnt from the one before.
    private static bool Keep(EngineSimulation run, LatencyModel? believed)
    {
        run.Loop.Latency = believed ?? run.Loop.Latency;
        return true;
    }

    private static double Trained(EngineSimulation run, TimeSpan from) => run.Steps.Where(s => s.Begun >= from && s.Begun < End)
        .Sum(s => s.Plan.Features.ForwardRows + (s.Plan.Features.BackwardRows / (double)Simulation.Scenario.Model.LayerCount));

    private static double Share(List<SimulatedRequest> requests, Func<SimulatedRequest, bool> target) =>
        requests.Count(target) / (double)requests.Count;

    private sealed record Outcome(
        double Surprise, int Requests, double Tpot, double TpotAlone, double Ttft, double TtftAlone, int Trained, double OverBudget);
}
