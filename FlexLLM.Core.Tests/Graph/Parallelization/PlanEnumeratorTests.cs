using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph.Parallelization;

[TestFixture]
internal sealed class PlanEnumeratorTests
{
    private static readonly string[] PaperColumn = ["C1", "C2", "C3", "C4", "C5"];
    private static readonly string[] PaperRow = ["R1", "R2", "R3", "R4a", "R4b", "R4c", "R5"];

    [Test]
    public void Enumerate_PaperRules_FindsThePaperPlansAndNoOther()
    {
        var random = new SeededRandom(1);
        for (int i = 0; i < 200; i++)
        {
            (int m, int n, int r, int p) = Plans.NarrowLora(ref random);
            Planning column = Plans.Of(BypassTap.ColumnParallel, Bypass.Lora(m, n, r), p);
            Planning row = Plans.Of(BypassTap.RowParallel, Bypass.Lora(m, n, r), p);

            Assert.That(column.Plans.Select(entry => entry.Name), Is.EqualTo(PaperColumn));
            Assert.That(row.Plans.Select(entry => entry.Name), Is.EqualTo(PaperRow));
            Assert.That(Plans.Undominated(column), Is.EqualTo(new[] { "C1", "C2", "C3", "C4" }), $"{m} {n} {r} {p}");
            Assert.That(Plans.Undominated(row), Is.EqualTo(new[] { "R1", "R2", "R3" }), $"{m} {n} {r} {p}");
            Assert.That(column.Plans.Single(entry => entry.Name == "C5").DominatedBy, Is.EqualTo("C2"));
        }
    }

    [Test]
    public void Enumerate_RankAsWideAsTheLayer_DominanceOfTheNarrowCaseIsGone()
    {
        Planning column = Plans.Of(BypassTap.ColumnParallel, Bypass.Lora(64, 64, 48), ranks: 2);
        Planning row = Plans.Of(BypassTap.RowParallel, Bypass.Lora(64, 64, 32), ranks: 4);

        Assert.That(Plans.Undominated(column), Does.Contain("C5"), "2 r > n: gathering n is cheaper than reducing r");
        Assert.That(Plans.Undominated(row), Does.Contain("R5"), "r p > m: an all-to-all of m is cheaper than gathering r");
    }

    [Test]
    public void Demand_RandomShapes_EqualsTheTablesOfThePaper()
    {
        var random = new SeededRandom(2);
        for (int i = 0; i < 200; i++)
        {
            (int m, int n, int r, int p) = Plans.NarrowLora(ref random);
            double ring = (p - 1.0) / p;
            double all = 2.0 * r * (m + n);
            double split = (double)r * (m + n) / p;
            double aWhole = ((double)r * m) + ((double)r * n / p);
            double bWhole = ((double)r * m / p) + ((double)r * n);
            double both = (double)r * (m + n);
            Dictionary<string, PlanDemand> demands = Plans.Of(BypassTap.ColumnParallel, Bypass.Lora(m, n, r), p).Plans
                .Concat(Plans.Of(BypassTap.RowParallel, Bypass.Lora(m, n, r), p).Plans)
                .ToDictionary(entry => entry.Name, entry => entry.Demand);

            // Name, weights, flops, sent forward, sent backward, reduced a step.
            Expect("C1", aWhole, 2 * aWhole, 0, 0, r * m);
            Expect("C2", split, all / p, 2 * ring * r, 2 * ring * r, 0);
            Expect("C3", both, all / p, ring * n / p, ring * n / p, both);
            Expect("C4", aWhole, all / p, ring * r, ring * r, r * m);
            Expect("C5", split, all / p, ring * n, ring * n, 0);
            Expect("R1", bWhole, 2 * bWhole, 0, 0, r * n);
            Expect("R2", bWhole, 2 * bWhole, 2 * ring * r, 0, 0);
            Expect("R3", split, all / p, ring * r, ring * r, 0);
            Expect("R4a", both, all, ring * m, 0, 0);
            Expect("R4b", aWhole, 2 * aWhole, ring * (m + n), ring * m, r * m);
            Expect("R4c", split, all / p, ring * m, ring * m, 0);
            Expect("R5", both, all / p, ring * ((m / (double)p) + n), ring * m / p, both);

            void Expect(string name, double weights, double flops, double sent, double backward, double step)
            {
                PlanDemand demand = demands[name];
                double[] found =
                    [demand.Weights, demand.ForwardFlops, demand.ForwardSent, demand.BackwardSent, demand.StepReduced];
                Assert.That(found, Is.EqualTo(new[] { weights, flops, sent, backward, step }).Within(1e-9).Percent, name);
                Assert.That(demand.BackwardFlops, Is.EqualTo(2 * flops).Within(1e-9).Percent, name);
            }
        }
    }

    [Test]
    public void Demand_SerialAdapterAndScale_FollowsFromTheirSteps()
    {
        var random = new SeededRandom(3);
        for (int i = 0; i < 50; i++)
        {
            int p = random.Next(2, 9);
            int n = p * random.Next(1, 200);
            int inner = p * random.Next(1, 20);
            double ring = (p - 1.0) / p;
            double linear = (double)n * inner;
            double whole = (2 * linear) + inner + n;
            Dictionary<string, PlanDemand> demands = new[]
            {
                Plans.Of(BypassTap.Replicated, Bypass.SerialAdapter(n, inner), p),
                Plans.Of(BypassTap.SplitHidden, Bypass.SerialAdapter(n, inner), p),
                Plans.Of(BypassTap.Replicated, Bypass.Scale(n), p),
                Plans.Of(BypassTap.SplitHidden, Bypass.Scale(n), p),
            }.SelectMany(planning => planning.Plans).ToDictionary(entry => entry.Name, entry => entry.Demand);

            // Name, weights, flops forward and backward, sent forward, sent backward, reduced a step.
            Expect("F(1,1)", whole, (4 * linear) + inner + n, (8 * linear) + inner + n, 0, 0, 0);
            Expect("F(1,4)", ((linear + n) / p) + linear + inner, (2 * linear) + inner + (((2 * linear) + n) / p),
                (4 * linear) + inner + (((4 * linear) + n) / p), ring * n, 2 * ring * n, linear + inner);
            Expect("F(2,1)", (linear / p) + inner + linear + n, (2 * linear / p) + inner + (2 * linear) + n,
                (4 * linear / p) + inner + (4 * linear) + n, 2 * ring * inner, ring * n, 0);
            Expect("F(3,3)", whole, ((4 * linear) + inner + n) / p, ((8 * linear) + inner + n) / p, ring * n, ring * n, whole);
            Expect("F(4,2)", (((2 * linear) + inner) / p) + n, (((4 * linear) + inner) / p) + n,
                (((8 * linear) + inner) / p) + n, 2 * ring * n, 2 * ring * n, 0);
            Expect("H(2,4)", (((2 * linear) + n) / p) + inner, (((4 * linear) + n) / p) + inner,
                (((8 * linear) + n) / p) + inner, 2 * ring * inner, 2 * ring * inner, 0);
            Expect("F(6)", n, n, 3 * n, 0, 0, 0);
            Expect("F(7)", n, n / p, 3 * n / p, ring * n, ring * n, n);
            Expect("H(8)", n / p, n / p, 3 * n / p, 0, 0, 0);
            Expect("H(7)", n, n / p, 3 * n / p, 2 * ring * n / p, 2 * ring * n / p, n);

            void Expect(
                string name, double weights, double forward, double backward, double sent, double sentBack, double step)
            {
                PlanDemand demand = demands[name];
                double[] found =
                [
                    demand.Weights, demand.ForwardFlops, demand.BackwardFlops, demand.ForwardSent, demand.BackwardSent,
                    demand.StepReduced,
                ];
                double[] expected = [weights, forward, backward, sent, sentBack, step];
                Assert.That(found, Is.EqualTo(expected).Within(1e-9).Percent, name);
            }
        }
    }

    [Test]
    public void Parameters_OfAllRanks_CoverEachTensorOnceOrAreCopies(
        [ValueSource(typeof(Plans), nameof(Plans.BypassNames))] string bypass, [Values(2, 4)] int ranks)
    {
        foreach (BypassPlan plan in BypassTap.All.SelectMany(tap =>
            PlanEnumerator.Enumerate(Plans.Small(bypass), tap, ranks, SearchRules.Full)))
        {
            foreach (PlanParameter parameter in plan.Parameters)
            {
                int elements = 0;
                for (int rank = 0; rank < ranks; rank++)
                {
                    int mine = parameter.RowsOn(rank, ranks).Count * parameter.ColumnsOn(rank, ranks).Count;
                    Assert.That(mine, Is.EqualTo(parameter.ElementsOnRank(ranks)));
                    elements += mine;
                }

                int copies = parameter.Layout.IsSplit ? 1 : ranks;
                Assert.That(elements, Is.EqualTo(copies * parameter.Rows * parameter.Columns), $"{parameter.Name} of {plan}");
                Assert.That(!parameter.GradientIsPartial || copies == ranks, "what is summed is a copy everywhere");
                Assert.That(!parameter.OnRankZeroOnly || copies == ranks, "what rank 0 adds all keep up to date");
            }

            IEnumerable<string> names = plan.Forward.OfType<ComputeStep>().Where(step => step.Case.Weight is not null)
                .SelectMany(step => step.Operator.HasBias
                    ? new[] { $"{step.Operator.Name}.weight", $"{step.Operator.Name}.bias" }
                    : [$"{step.Operator.Name}.weight"]);
            Assert.That(plan.Parameters.Select(parameter => parameter.Name), Is.EqualTo(names));
        }
    }

    [Test]
    public void Enumerate_SerialAdapterOnCopies_ReducesAtTheTapWhatTheBackboneWantsWhole()
    {
        Assert.That(AtTap("F(1,1)"), Is.Null);
        Assert.That(AtTap("F(4,2)"), Is.EqualTo("all-reduce"));
        Assert.That(AtTap("F(2,1)"), Is.EqualTo("all-gather(hidden)"));
        Assert.That(AtTap("F(3,3)"), Is.EqualTo("all-gather(tokens)"));

        static string? AtTap(string name) => Plans
            .Find(Bypass.SerialAdapter(64, 8), BypassTap.Replicated, 4, name)
            .Backward.SingleOrDefault(step => step.Of is null)?.Move?.Label;
    }

    [Test]
    public void Enumerate_FullRules_FindsOneMorePlanThatMattersAndSomeThatDoNot()
    {
        Planning column = Plans.Of(BypassTap.ColumnParallel, Bypass.Lora(4096, 14336, 16), 4, SearchRules.Full);
        Planning row = Plans.Of(BypassTap.RowParallel, Bypass.Lora(14336, 4096, 16), 4, SearchRules.Full);

        Assert.That(column.Plans.Select(entry => entry.Name), Is.EqualTo(
            new[] { "C1", "C2", "C3", "C4", "C5", "C6", "C(2,2)", "C(2,3)", "C(2,5)", "C(3,2)", "C(4,3)" }));
        Assert.That(Plans.Undominated(column), Is.EqualTo(
            new[] { "C1", "C2", "C3", "C4", "C6", "C(2,2)", "C(2,3)", "C(3,2)" }));
        Assert.That(row.Plans, Has.Count.EqualTo(15));
        Assert.That(Plans.Undominated(row), Is.EqualTo(new[] { "R1", "R2", "R3" }));
    }

    [Test]
    public void C6_BesideC2_SendsHalfForTheSameWeightsAndReadsMore()
    {
        IReadOnlyList<PlanEntry> plans =
            Plans.Of(BypassTap.ColumnParallel, Bypass.Lora(4096, 4096, 16), 4, SearchRules.Full).Plans;
        PlanDemand c2 = plans.Single(entry => entry.Name == "C2").Demand;
        PlanDemand c6 = plans.Single(entry => entry.Name == "C6").Demand;

        Assert.That((c6.Weights, c6.ForwardFlops, c6.StepReduced), Is.EqualTo((c2.Weights, c2.ForwardFlops, c2.StepReduced)));
        Assert.That((2 * c6.ForwardSent, 2 * c6.BackwardSent), Is.EqualTo((c2.ForwardSent, c2.BackwardSent)));
        Assert.That((c6.Inputs, c2.Inputs), Is.EqualTo((4096.0 + 16, 1024.0 + 16)));
    }

    [Test]
    public void Enumerate_EachRuleAlone_AdmitsItsFamilyOnly()
    {
        Assert.That(Extra(SearchRules.Paper with { GathersRank = true }), Is.EqualTo(new[] { "C6" }));
        Assert.That(Extra(SearchRules.Paper with { ReducesDeferredSums = true }), Is.EqualTo(new[] { "C(2,5)" }));
        Assert.That(
            Extra(SearchRules.Paper with { MovesOnBothEdges = true }),
            Is.EqualTo(new[] { "C(2,2)", "C(2,3)", "C(3,2)", "C(4,3)" }));

        static IEnumerable<string> Extra(SearchRules rules) =>
            Plans.Of(BypassTap.ColumnParallel, Bypass.Lora(4096, 4096, 16), 4, rules).Plans
                .Select(entry => entry.Name)
                .Except(PaperColumn);
    }

    [Test]
    public void Enumerate_AllRules_YieldsNoPlanTwice([ValueSource(typeof(Plans), nameof(Plans.BypassNames))] string bypass)
    {
        foreach (BypassTap tap in BypassTap.All)
        {
            IReadOnlyList<BypassPlan> plans = PlanEnumerator.Enumerate(Plans.Small(bypass), tap, 4, SearchRules.Full);
            Assert.That(plans.Select(plan => plan.ToString()), Is.Unique);
            Assert.That(PlanNames.Of(plans), Is.Unique);
        }
    }

    [Test]
    public void Enumerate_AllRules_NeedsNoMoreThanCollectivesBetweenEqualRanks(
        [ValueSource(typeof(Plans), nameof(Plans.BypassNames))] string bypass)
    {
        ParallelOperatorKind[] collectives =
        [
            ParallelOperatorKind.AllReduce, ParallelOperatorKind.AllGather, ParallelOperatorKind.ReduceScatter,
            ParallelOperatorKind.AllToAll,
        ];
        foreach (BypassPlan plan in BypassTap.All.SelectMany(tap =>
            PlanEnumerator.Enumerate(Plans.Small(bypass), tap, 4, SearchRules.Full)))
        {
            IEnumerable<ParallelOperatorKind> forward = plan.Forward
                .OfType<MoveStep>().Where(move => move.Communicates(4)).Select(move => move.Operator.Kind);
            IEnumerable<ParallelOperatorKind> backward = plan.Backward
                .Where(step => step.Move is not null).Select(step => step.Move!.Value.Kind);
            Assert.That(forward.Concat(backward).Distinct(), Is.SubsetOf(collectives), plan.ToString());

            // Whoever has no operator to run either passes on what it has, computes, or cuts out its share.
            Assert.That(plan.Backward.Where(step => step.Move is null && step.Of is MoveStep && step.From != step.To)
                .All(step => step.KeepsShare), plan.ToString());
        }
    }

    [Test]
    public void Enumerate_RankNotDivisible_NeverSplitsTheRank()
    {
        Planning column = Plans.Of(BypassTap.ColumnParallel, Bypass.Lora(64, 64, 6), ranks: 4);
        Planning row = Plans.Of(BypassTap.RowParallel, Bypass.Lora(64, 64, 6), ranks: 4);

        Assert.That(column.Plans.Select(entry => entry.Name), Is.EqualTo(PaperColumn.Except(["C5"])));
        Assert.That(row.Plans.Select(entry => entry.Name), Is.EqualTo(PaperRow.Except(["R3", "R4c"])));
    }

    [Test]
    public void Enumerate_NonlinearBypassOnRows_CannotStayPartialAndTakesR2OrR3()
    {
        Planning row = Plans.Of(BypassTap.RowParallel, Bypass.Adapter(4096, 4096, 64), ranks: 4);

        Assert.That(row.Plans.Select(entry => entry.Name), Does.Not.Contain("R1").And.Contain("R2").And.Contain("R3"));
        Assert.That(row.Plans.Select(entry => entry.Plan.ToString()), Does.Contain(
            "X[-,-,|] D(2) [+,-,-] -all-reduce-> [=,-,-] act [=,-,-] U(1) [=,-,-] add after the reduce"));
    }
}
