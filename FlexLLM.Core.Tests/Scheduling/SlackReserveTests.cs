using FlexLLM.Scheduling;
using FsCheck;
using FsCheck.Fluent;
using NUnit.Framework;
using static FlexLLM.Tests.Scheduling.Snapshots;

namespace FlexLLM.Tests.Scheduling;

[TestFixture]
[Parallelizable]
internal sealed class SlackReserveTests
{
    private static readonly Config Many = Repeatable.Many(seed: 11);

    private static readonly TimeSpan Target = Ms(50);

    /// <summary>Steps' milliseconds beyond the target.</summary>
    private static Arbitrary<int[]> Steps { get; } = Gen.Choose(-40, 120).ArrayOf().ToArbitrary();

    [Test]
    public void For_NothingSeen_KeepsNothing() =>
        Assert.That(SlackReserve.Initial.For(1_000, Target), Is.EqualTo(TimeSpan.Zero));

    [Test]
    public void For_StepsAllAlikeWithinTheTarget_KeepsNothing()
    {
        SlackReserve seen = Seen(Enumerable.Repeat(-20.0, 400));

        Assert.That(seen.For(1_000, Target), Is.LessThan(Ms(0.01)));
    }

    /// <summary>The closed form's highest point, of steps that save 20 ms each, and need 60 in one of ten groups of eight.</summary>
    [Test]
    public void For_BurstsNowAndThen_KeepsWhatSoManyStepsClimb()
    {
        double[] steps = [.. Enumerable.Range(0, 4_000).Select(i => i / 8 % 10 == 0 ? 60.0 : -20.0)];
        SlackReserve seen = Seen(steps, secondsPerStep: 1e-3);

        // Mean -12 ms a step; variance of a group (8 * 80)^2 * 0.1 * 0.9, an eighth of it a step.
        const double variance = 640.0 * 640 * 0.09 / 8;
        const double highest = 25.0 * variance / (4 * 12 * 12);
        Assert.That(seen.For(10_000, Target).TotalMilliseconds,
            Is.EqualTo((5 * Math.Sqrt(highest * variance)) - (highest * 12)).Within(6).Percent);
        Assert.That(seen.For(4, Target).TotalMilliseconds, Is.EqualTo((5 * Math.Sqrt(4 * variance)) - (4 * 12)).Within(6).Percent);
    }

    [Test]
    public void For_RequestsAloneBreakTheTarget_GrowsWithEveryTokenToCome()
    {
        SlackReserve seen = Seen(Enumerable.Repeat(5.0, 80));

        Assert.That(seen.For(10, Target).TotalMilliseconds, Is.EqualTo(50).Within(0.1));
        Assert.That(seen.For(100, Target).TotalMilliseconds, Is.EqualTo(500).Within(0.1));
    }

    /// <summary>Requests of another class beside it change nothing: what is kept hangs on its own target and on times.</summary>
    [Test]
    public void For_LooserTarget_KeepsLess()
    {
        SlackReserve seen = Seen(Enumerable.Range(0, 800).Select(i => i / 8 % 5 == 0 ? 60.0 : -20.0), secondsPerStep: 1e-3);

        Assert.That(seen.For(100, Ms(1_000)), Is.LessThan(seen.For(100, Target) / 10));
        Assert.That(Seen(Enumerable.Repeat(0.0, 800)).For(100, TimeSpan.FromHours(1)), Is.EqualTo(TimeSpan.Zero));
    }

    [Test]
    public void For_AnySteps_NeverLessForMoreTokensOrMoreCaution() =>
        FsCheck.Check.One(Many, Prop.ForAll(Steps, steps => IsMonotone(steps, late: true)));

    [Test]
    public void For_Control_LessCaution_IsFound() => Assert.That(
        () => FsCheck.Check.One(Many, Prop.ForAll(Steps, steps => IsMonotone(steps, late: false))), Throws.Exception);

    [Test]
    public void Observe_BurstLongAgo_IsForgotten()
    {
        SlackReserve burst = Seen([.. Enumerable.Repeat(-20.0, 80), .. Enumerable.Repeat(100.0, 8)]);
        SlackReserve later = burst;
        for (int i = 0; i < 8_000; i++)
        {
            later = later.Observe(Target - Ms(20), TimeSpan.FromSeconds(10 + (i * 0.05)));
        }

        Assert.That(later.For(1_000, Target), Is.LessThan(burst.For(1_000, Target) / 20));
    }

    [Test]
    public void Ended_LateBecauseOfFinetuning_IsMoreCareful()
    {
        SlackReserve calm = Calm();

        Assert.That(calm.Ended(Ms(5), finetuning: Ms(5)).Caution, Is.GreaterThan(2 * calm.Caution));
    }

    [TestCase(-5, 100, TestName = "Ended_InTime_IsLessCareful")]
    [TestCase(5, 4, TestName = "Ended_LateWithoutFinetuningToo_IsLessCareful")]
    public void Ended_NotFinetuningsFault_IsLessCareful(int late, int finetuning)
    {
        SlackReserve calm = Calm();

        Assert.That(calm.Ended(Ms(late), Ms(finetuning)).Caution, Is.LessThan(calm.Caution));
    }

    /// <summary>
    /// Where so many answers are late, caution stays where it is: one in a hundred where somebody is always there, fewer where finetuning
    /// has time when nobody is. It has bounds on both sides.
    /// </summary>
    [TestCase(0.0, 100)]
    [TestCase(0.2, 2000)]
    [TestCase(0.6, 2000)]
    public void Ended_AsManyLateAsMayBe_StaysAsCareful(double idle, int answers)
    {
        SlackReserve reserve = Idle(Calm(), idle).Ended(Ms(1), Ms(1));
        double before = reserve.Caution;
        for (int i = 1; i <= 20 * answers; i++)
        {
            reserve = reserve.Ended(i % answers == 0 ? Ms(1) : Ms(-1), Ms(1));
        }

        Assert.That(reserve.Caution, Is.EqualTo(before).Within(2).Percent);
        Assert.That(Answers(reserve, 10_000, Ms(-1)).Caution, Is.GreaterThan(0));
        Assert.That(Answers(reserve, 10_000, Ms(1)).Caution, Is.LessThan(10));
    }

    [Test]
    public void Passed_BusyAfterALongRest_IsBoldAgain()
    {
        SlackReserve rested = Calm().Ended(Ms(1), Ms(1)).Passed(TimeSpan.FromHours(1), isIdle: true);
        SlackReserve busy = rested.Passed(TimeSpan.FromMinutes(20), isIdle: false);

        Assert.That(Answers(busy, 50, Ms(-1)).Caution, Is.LessThan(0.7 * Answers(rested, 50, Ms(-1)).Caution));
    }

    [Test]
    public void Plan_Reserve_IsNotSpentByFinetuning([Values] bool keeps)
    {
        SlackReserve seen = Seen(Enumerable.Repeat(5.0, 80)); // 5 ms for each of ten tokens to come.
        EngineSnapshot now = Of([Decoding(1, 50) with { TokensGenerated = 2, TokensMax = 61 }]) with { Reserve = seen };
        var limits = new StepLimits { TpotPlanned = 1.0, ChunksAhead = 0, KeepsReserve = keeps };

        StepPlan plan = HybridTokenScheduler.Plan(now, limits, Latency);

        Assert.That(plan.Budget.TotalMilliseconds, Is.EqualTo(keeps ? 50 : 100).Within(0.5), "two targets of 50 ms saved");
    }

    private static bool IsMonotone(int[] steps, bool late)
    {
        SlackReserve reserve = Seen(steps.Select(ms => (double)ms));
        SlackReserve other = reserve.Ended(late ? Ms(1) : Ms(-1), Ms(1));
        int[] tokens = [0, 1, 2, 5, 20, 100, 5_000];
        return tokens.Zip(tokens.Skip(1)).All(pair => reserve.For(pair.First, Target) <= reserve.For(pair.Second, Target)) &&
            tokens.All(n => reserve.For(n, Target) <= other.For(n, Target));
    }

    private static SlackReserve Seen(IEnumerable<double> milliseconds, double secondsPerStep = 0.05)
    {
        SlackReserve reserve = SlackReserve.Initial;
        int steps = 0;
        foreach (double excess in milliseconds)
        {
            reserve = reserve.Observe(Target + Ms(excess), TimeSpan.FromSeconds(steps++ * secondsPerStep));
        }

        return reserve;
    }

    // Seconds without requests among those with some, until the share is told.
    private static SlackReserve Idle(SlackReserve reserve, double share) => Enumerable.Range(0, 20_000).Aggregate(
        reserve, (r, i) => r.Passed(Ms(100), isIdle: (i % 100) < 100 * share));

    // Less careful than an engine begins.
    private static SlackReserve Calm() => Answers(SlackReserve.Initial, 20, Ms(-1));

    private static SlackReserve Answers(SlackReserve reserve, int count, TimeSpan late) =>
        Enumerable.Range(0, count).Aggregate(reserve, (r, _) => r.Ended(late, Ms(1)));
}
