using FlexLLM.Scheduling;
using FsCheck;
using FsCheck.Fluent;
using NUnit.Framework;
using static FlexLLM.Tests.Scheduling.Snapshots;

namespace FlexLLM.Tests.Scheduling;

/// <summary>How finetuning is cut into items that can be waited for, and what cutting may cost.</summary>
[TestFixture]
[Parallelizable]
internal sealed class BackwardItemTests
{
    private static readonly TimeSpan Tick = TimeSpan.FromTicks(4);

    private static readonly JobSnapshot Job = new()
    {
        Id = new(1),
        Weight = 1.0,
        Phase = JobPhase.Backward,
        SampleTokens = 400,
        RowsLeft = 400,
        Layer = 3,
        LayersAbove = 3,
    };

    /// <summary>Coefficients as exponents, where the item ends, and how long it should take at most, in 0.1 ms.</summary>
    private static Arbitrary<(int[] Exponents, int RowsLeft, int Quantum)> MachinesAndItems { get; } = (
        from exponents in Gen.Choose(-8, -1).ArrayOf(LatencyCoefficients.Count)
        from rowsLeft in Gen.Choose(1, 900)
        from quantum in Gen.Choose(1, 400)
        select (exponents, rowsLeft, quantum)).ToArbitrary();

    // A layer's weights are read in 30 ms, and rows cost 0.1 ms: the quantum of 20 ms is over before the first row.
    [Test]
    public void Plan_LayerReadLongerThanTheQuantum_CutsItemsWhereTheyPay()
    {
        var limits = new StepLimits { IdleStepMax = Ms(500) };
        StepPlan plan = Plan(Reading(30), Job, limits);

        Assert.That(plan.Backward.Take(2).Select(w => w.RowCount), Is.EqualTo(new[] { 300, 100 }), "30 ms read, 30 ms of rows");
        double rowsPerSecond = plan.Backward.Sum(w => w.RowCount) / plan.LatencyPredicted.TotalSeconds;
        Assert.That(rowsPerSecond, Is.GreaterThan(0.45 * Best(Reading(30))), "items of one row would reach a three-hundredth");
    }

    [Test]
    public void Plan_LayerReadWithinHalfTheQuantum_CutsItemsAtTheQuantum() =>
        Assert.That(Plan(Reading(8), Job).Backward[0].RowCount, Is.EqualTo(120), "8 ms read, 12 ms of rows");

    [Test]
    public void Plan_ReadLongerThanAnIdleStep_StillDoesWhatPays()
    {
        BackwardWindow item = Plan(Reading(150), Job).Backward.Single();
        Assert.That(item, Is.EqualTo(new BackwardWindow(new(1), 3, 0, 400)), "all rows take no longer than their layer's read");

        JobSnapshot forward = Job with { Phase = JobPhase.Forward, SampleTokens = 5_000 };
        LatencyModel slow = Latency with { Coefficients = Latency.Coefficients.With(LatencyTerm.RowsTo1, 20e-3) };
        Assert.That(
            Plan(slow, forward, new StepLimits { IdleStepMax = Ms(15) }).Forward.Single().Tokens, Is.EqualTo(201),
            "the first row reads the weights in 20 ms");
    }

    [Test]
    public void Plan_AnyMachine_ItemsPassTheQuantumOnlyWhereAShorterOneWouldNotPay() =>
        FsCheck.Check.One(Repeatable.Many(seed: 11, count: 1_000), Prop.ForAll(MachinesAndItems, c => FaultOf(c, floor: 2.0) is null));

    [Test]
    public void FaultOf_FloorThatIsNotTheRule_IsFound() => Assert.That(
        () => FsCheck.Check.One(
            Repeatable.Many(seed: 11, count: 1_000), Prop.ForAll(MachinesAndItems, c => FaultOf(c, floor: 1.5) is null)),
        Throws.Exception);

    /// <summary>What is wrong with the items that an idle machine plans, where an item may take so many times its fixed cost.</summary>
    private static string? FaultOf((int[] Exponents, int RowsLeft, int Quantum) c, double floor)
    {
        var latency = new LatencyModel(
            LatencyCoefficients.From([.. c.Exponents.Select(e => Math.Pow(10.0, e))]), Correction: 1.0, Tail: 1.0);
        var limits = new StepLimits { BackwardItemTimeMax = Ms(c.Quantum / 10.0), IdleStepMax = Ms(400) };
        JobSnapshot job = Job with { SampleTokens = 900, RowsLeft = c.RowsLeft };
        StepPlan plan = Plan(latency, job, limits);
        TimeSpan fixedCost = latency.PredictFixed(default(StepFeatures).WithBackward(0, 1));
        StepFeatures before = default;
        for (int i = 0; i < plan.Backward.Length; i++)
        {
            BackwardWindow item = plan.Backward[i];
            StepFeatures after = before.WithBackward(item.RowStart, item.RowCount);
            TimeSpan took = latency.Predict(after) - latency.Predict(before);
            if (item.RowCount > 1 && took > limits.BackwardItemTimeMax + Tick && took > (fixedCost * floor) + Tick)
            {
                return "longer than the quantum and than pays";
            }

            // The last item of a step may be cut by the step's own end.
            bool isCut = item.RowStart > 0 && item.RowCount < limits.BackwardRowsMax && i < plan.Backward.Length - 1;
            StepFeatures more = before.WithBackward(item.RowStart - 1, item.RowCount + 1);
            if (isCut && latency.Predict(more) - latency.Predict(before) <= (fixedCost * floor) - Tick)
            {
                return "shorter than pays";
            }

            before = after;
        }

        return plan.Backward.IsEmpty ? "an idle machine does nothing" : null;
    }

    private static LatencyModel Reading(double milliseconds) => Latency with
    {
        Coefficients = LatencyCoefficients.Linear(10e-3, 1e-4, 0.0, 0.0, 1e-4, 0.0, milliseconds * 1e-3, 1e-4, 0.0),
    };

    // Rows a second where each layer is one item.
    private static double Best(LatencyModel latency) =>
        Job.SampleTokens / latency.Predict(default(StepFeatures).WithBackward(0, Job.SampleTokens)).TotalSeconds;

    private static StepPlan Plan(LatencyModel latency, JobSnapshot job, StepLimits? limits = null) =>
        HybridTokenScheduler.Plan(Snapshots.Of([]) with { Jobs = [job] }, limits ?? new StepLimits(), latency);
}
