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
    public void Enumerate_AllRules_YieldsNoPlanTwice([Values] bool adapter)
    {
        Bypass bypass = adapter ? Bypass.Adapter(64, 64, 8) : Bypass.Lora(64, 64, 8);
        foreach (BypassTap tap in new[] { BypassTap.ColumnParallel, BypassTap.RowParallel })
        {
            IReadOnlyList<BypassPlan> plans = PlanEnumerator.Enumerate(bypass, tap, 4, SearchRules.Full);
            Assert.That(plans.Select(plan => plan.ToString()), Is.Unique);
            Assert.That(PlanNames.Of(plans), Is.Unique);
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
