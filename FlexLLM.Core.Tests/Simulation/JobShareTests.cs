using FlexLLM.Backends.Null;
using FlexLLM.Engine;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;
using FsCheck.Fluent;
using NUnit.Framework;

namespace FlexLLM.Tests.Simulation;

/// <summary>Jobs share what finetuning gets by weight and priority, whenever they come, stop and go on.</summary>
[TestFixture]
[Parallelizable]
internal sealed class JobShareTests
{
    private const int SampleTokensMax = 1023;

    private static readonly Workload Medium = new() { Requests = 4_000, RequestsPerSecond = 9.0 };
    private static readonly Scenario TwoJobs = new() { Workload = Medium, Jobs = 2 };

    private static readonly Scenario DearCalls = TwoJobs with
    {
        Machine = new NullMachine { FlopsPerSecond = 150e12 / 8, BytesPerSecond = 1.4e12 / 8, SecondsPerCall = 100e-6 },
    };

    // Most that a job gets in a step: a window, then all layers of a sample. Who is behind goes first, so turns alone drift no further.
    private const double WorkMax = EngineSimulation.TokensPerStepMax + SampleTokensMax;

    [TestCase(1.0, 1.0)]
    [TestCase(1.0, 3.0)]
    [TestCase(3.0, 1.0)]
    [TestCase(0.01, 0.03)]
    public void Weights_RequestsBeside_ShareTheTokens(double first, double second)
    {
        using var run = new SharedRun(TwoJobs with { JobWeights = [first, second] });
        run.Run(steps: 1_000);

        Assert.That(run.Ratio, Is.EqualTo(second / first).Within(3).Percent);
    }

    // With two samples in flight a job has work for nearly all of a step; with one, the other job takes what its turns leave.
    [TestCase(1.0, 1.0)]
    [TestCase(1.0, 3.0)]
    public void Weights_IdleMachine_ShareTheTokens(double first, double second)
    {
        using var run = new SharedRun(
            TwoJobs with { Workload = Workload.None, JobWeights = [first, second], GradientAccumulation = 8 });
        run.Run(steps: 1_000);

        Assert.That(run.Ratio, Is.EqualTo(second / first).Within(10).Percent);
    }

    [Test]
    public void Priority_OneLevelMore_CountsLikeFourTimesTheWeight()
    {
        using var run = new SharedRun(TwoJobs with { JobPriorities = [0, 1] });
        run.Run(steps: 1_000);

        Assert.That(run.Ratio, Is.EqualTo(4.0).Within(3).Percent);
    }

    [Test]
    public void Join_Late_NeitherCatchesUpNorWaits()
    {
        using var run = new SharedRun(TwoJobs with { Jobs = 1 });
        run.Run(steps: 1_000);
        Assert.That(run.Served[0], Is.GreaterThan(10 * WorkMax), "else there is nothing to catch up");

        run.Simulation.Join();
        run.Forget();
        run.Run(steps: 500);

        Assert.That(run.GapMax(), Is.LessThanOrEqualTo(2 * WorkMax), "from the first step on");
        Assert.That(run.Ratio, Is.EqualTo(1.0).Within(10).Percent);
    }

    [Test]
    public void Pause_AndResume_NeitherCatchesUpNorWaits()
    {
        using var run = new SharedRun(TwoJobs);
        run.Run(steps: 200);
        run.Simulation.Loop.Jobs.Pause(new JobId(2));
        run.Forget();
        run.Run(steps: 800);
        Assert.That(run.Served[1], Is.Zero);
        Assert.That(run.Served[0], Is.GreaterThan(10 * WorkMax), "else there is nothing to catch up");

        run.Simulation.Loop.Jobs.Resume(new JobId(2));
        run.Forget();
        run.Run(steps: 500);

        Assert.That(run.GapMax(), Is.LessThanOrEqualTo(2 * WorkMax), "from the first step on");
        Assert.That(run.Ratio, Is.EqualTo(1.0).Within(10).Percent);
    }

    [Test]
    public void Cancel_OneOfThree_LeavesItsShareAndItsMemoryToTheOthers()
    {
        using var run = new SharedRun(TwoJobs with { Jobs = 3, JobWeights = [1.0, 2.0, 3.0] });
        run.Run(steps: 400);
        JobTable jobs = run.Simulation.Loop.Jobs;
        long held = jobs.Bytes;
        double before = run.Served.Sum();
        Assert.That(jobs.Cancel(new JobId(3)), Is.True);

        run.Forget();
        run.Run(steps: 400);

        Assert.That(run.Simulation.Jobs[2].Result.Completion.IsCanceled, Is.True);
        Assert.That(jobs.Bytes, Is.EqualTo(held * 2 / 3).Within(10).Percent, "samples in flight are of different lengths");
        Assert.That(run.Served[2], Is.Zero);
        Assert.That(run.Ratio, Is.EqualTo(2.0).Within(10).Percent);
        Assert.That(run.Served.Sum(), Is.EqualTo(before).Within(10).Percent, "the machine gives finetuning as much as before");
    }

    // On an idle machine the light job has what the heavy one cannot use; nobody pays for that once requests come.
    [Test]
    public void LeftOvers_TakenOnAnIdleMachine_AreNotPaidBackForLong()
    {
        var later = Medium with { Begins = TimeSpan.FromSeconds(60) };
        using var run = new SharedRun(TwoJobs with { Workload = later, JobWeights = [1.0, 3.0] });
        run.Simulation.Run(s => s.Requests.Count > 0);
        run.Run(steps: 1);
        Assert.That(run.Served[0] - (run.Served[1] / 3.0), Is.GreaterThan(20 * WorkMax), "else there is nothing to pay back");

        run.Forget();
        run.Run(steps: 1_000);

        // A lead of two steps' work is made up for, and one step's work is between turns.
        Assert.That(run.GapMax(), Is.LessThanOrEqualTo(3 * WorkMax));
        Assert.That(run.Served[0], Is.GreaterThan(10 * WorkMax), "else it stood still");
    }

    // Every call costs much: windows and items are mostly their beginning, and wait for larger budgets. Who waits for that lets another
    // have a step or two, and has the next ones.
    [TestCase(1.0, 1.0)]
    [TestCase(1.0, 3.0)]
    [TestCase(3.0, 1.0)]
    [TestCase(1.0, 1.0, 2.0, 4.0, 1.0)]
    public void Thrift_DearCalls_PushesNobodyOut(params double[] weights)
    {
        using var run = new SharedRun(DearCalls with { Jobs = weights.Length, JobWeights = weights });
        run.Run(steps: 1_500);

        TestContext.Out.WriteLine($"gap {run.GapMax():F0}; {string.Join(' ', run.Served)}");
        Assert.That(run.Simulation.Steps.Count(s => !s.Plan.HasFinetuning), Is.GreaterThan(150), "else thrift has no part in it");
        Assert.That(run.GapMax(), Is.LessThanOrEqualTo(3 * WorkMax / weights.Min()));
        Assert.That(run.Ratio, Is.EqualTo(weights[1] / weights[0]).Within(5).Percent);
    }

    // With two samples in flight there is nearly always something that fits, so that one takes now and then what another waits with. What
    // was left over is not paid back, but it is little.
    [TestCase(1.0, 1.0)]
    [TestCase(3.0, 1.0)]
    public void Thrift_TwoSamplesInFlight_ShareTheTokens(double first, double second)
    {
        using var run = new SharedRun(DearCalls with { JobWeights = [first, second], GradientAccumulation = 8 });
        run.Run(steps: 1_500);

        Assert.That(run.Simulation.Steps.Count(s => !s.Plan.HasFinetuning), Is.GreaterThan(150), "else thrift has no part in it");
        Assert.That(run.Ratio, Is.EqualTo(second / first).Within(5).Percent);
    }

    // The lead that the engine bounds is two steps' work, and one more step's lies between turns.
    [Test]
    public void Gap_AnyWeightsAndNumberOfJobs_IsBoundedAndNobodyStarves() => FsCheck.Check.One(
        Repeatable.Many(seed: 11, count: 12), Prop.ForAll<int>(GapIsBounded));

    private static void GapIsBounded(int seed)
    {
        var random = new SeededRandom((ulong)(uint)seed);
        double[] weights = new double[random.Next(2, 6)];
        foreach (ref double weight in weights.AsSpan())
        {
            weight = Math.Pow(2.0, random.Next(-2, 3));
        }

        using var run = new SharedRun(TwoJobs with { Jobs = weights.Length, JobWeights = weights }, (ulong)(uint)seed);
        run.Run(steps: 400);
        Assert.That(run.GapMax(), Is.LessThanOrEqualTo(3 * WorkMax / weights.Min()), string.Join(' ', weights));
        Assert.That(run.Served.Min(), Is.GreaterThan(0), string.Join(' ', weights));
    }

    [Test]
    public void Gap_Control_WrongWeightsAreFound()
    {
        using var run = new SharedRun(TwoJobs with { JobWeights = [1.0, 1.0] });
        run.Run(steps: 400);

        Assert.That(run.GapMax(1.0, 3.0), Is.GreaterThan(3 * WorkMax));
    }

    // A simulation, and what each job had since the last time that it was forgotten.
    private sealed class SharedRun(Scenario scenario, ulong seed = 1) : IDisposable
    {
        private readonly List<double[]> _history = [];
        private int _seen;

        public EngineSimulation Simulation { get; } = new(scenario, seed);

        public double[] Served { get; private set; } = new double[scenario.Jobs];

        public double Ratio => Served[1] / Served[0];

        public void Forget()
        {
            _seen = Simulation.Steps.Count;
            _history.Clear();
            Served = new double[Simulation.Jobs.Count];
        }

        public void Run(int steps)
        {
            int end = Simulation.Steps.Count + steps;
            Simulation.Run(s => s.Steps.Count >= end);
            for (; _seen < Simulation.Steps.Count; _seen++)
            {
                StepRecord step = Simulation.Steps[_seen];
                foreach (ForwardWindow window in step.Plan.Forward)
                {
                    Served[window.Id.Value - 1] += window.Tokens;
                }

                foreach (BackwardWindow window in step.Backward)
                {
                    Served[window.Id.Value - 1] += (double)window.RowCount / Scenario.Model.LayerCount;
                }

                _history.Add([.. Served]);
            }
        }

        /// <summary>The widest difference of service per weight between two jobs.</summary>
        public double GapMax(params double[] weights)
        {
            double[] shares = weights.Length > 0 ? weights : scenario.JobWeights;
            return _history.Max(served =>
            {
                double[] normal = [.. served.Select((tokens, i) => tokens / (i < shares.Length ? shares[i] : 1.0))];
                return normal.Max() - normal.Min();
            });
        }

        public void Dispose() => Simulation.Dispose();
    }
}
