using FlexLLM.Graph.Parallelization;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph.Parallelization;

[TestFixture]
internal sealed class OperatorRulesTests
{
    [Test]
    public void Linear_HasTheFiveCasesOfThePaper()
    {
        Assert.That(OperatorRules.Linear.Select(c => $"({c.Number}) {c.Input} {c.Weight} {c.Output}"), Is.EqualTo(new[]
        {
            "(1) [=,-,-] [=,-,-] [=,-,-]",
            "(2) [-,-,|] [-,-,|] [+,-,-]",
            "(3) [-,|,-] [=,-,-] [-,|,-]",
            "(4) [=,-,-] [-,|,-] [-,-,|]",
            "(5) [+,-,-] [=,-,-] [+,-,-]",
        }));
    }

    [Test]
    public void ElementwiseLinear_HasItsVectorAlongTheColumns()
    {
        Assert.That(OperatorRules.ElementwiseLinear.Select(c => $"({c.Number}) {c.Input} {c.Weight} {c.Output}"), Is.EqualTo(new[]
        {
            "(6) [=,-,-] [=,-,-] [=,-,-]",
            "(7) [-,|,-] [=,-,-] [-,|,-]",
            "(8) [-,-,|] [-,-,|] [-,-,|]",
            "(9) [+,-,-] [=,-,-] [+,-,-]",
        }));
    }

    // Layout of the bias, who adds it; then layout of dX and which gradients are partial.
    [TestCase(1, "[=,-,-] all", "[=,-,-]", "[=,-,-]")]
    [TestCase(1, "[=,-,-] all", "[+,-,-]", "[+,-,-] weight bias")]
    [TestCase(2, "[=,-,-] rank 0", "[=,-,-]", "[-,-,|]")]
    [TestCase(3, "[=,-,-] all", "[-,|,-]", "[-,|,-] weight bias")]
    [TestCase(4, "[-,-,|] all", "[-,-,|]", "[+,-,-]")]
    [TestCase(5, "[=,-,-] rank 0", "[=,-,-]", "[=,-,-] weight")]
    [TestCase(6, null, "[=,-,-]", "[=,-,-]")]
    [TestCase(6, null, "[+,-,-]", "[+,-,-] weight")]
    [TestCase(7, null, "[-,|,-]", "[-,|,-] weight")]
    [TestCase(8, null, "[-,-,|]", "[-,-,|]")]
    [TestCase(9, null, "[=,-,-]", "[=,-,-] weight")]
    public void Backward_EachCase_SaysWhoHasWhat(int number, string? bias, string gradient, string expected)
    {
        OperatorCase weighted = OperatorRules.Linear.Concat(OperatorRules.ElementwiseLinear).Single(c => c.Number == number);

        GradientRule rule = OperatorRules.Backward(weighted, TensorLayout.Parse(gradient));

        string partial = (rule.WeightIsPartial ? " weight" : "") + (rule.BiasIsPartial ? " bias" : "");
        Assert.That($"{rule.Input}{partial}", Is.EqualTo(expected));
        if (bias is not null)
        {
            BiasRule held = OperatorRules.BiasOf(weighted);
            Assert.That($"{held.Layout} {(held.OnRankZeroOnly ? "rank 0" : "all")}", Is.EqualTo(bias));
        }
    }

    [Test]
    public void UnaryOperators_AcceptTheirLayoutsOnly()
    {
        Assert.That(
            Inputs(OperatorRules.ElementwiseNonlinear),
            Is.EquivalentTo(TensorLayout.Legal.Except([TensorLayout.PreReduce])));
        Assert.That(Inputs(OperatorRules.RmsNorm), Is.EquivalentTo(
            new[] { TensorLayout.Whole, TensorLayout.Replicated, TensorLayout.SplitRows }));
        Assert.That(Inputs(OperatorRules.Attention(8, 4, ranks: 4)), Is.EquivalentTo(
            new[] { TensorLayout.Whole, TensorLayout.Replicated, TensorLayout.SplitColumns }));
        Assert.That(Inputs(OperatorRules.Attention(8, 2, ranks: 4)), Does.Not.Contain(TensorLayout.SplitColumns));
    }

    [Test]
    public void Add_EqualLayoutsOnly_SaveACopyOnOneRank()
    {
        foreach (TensorLayout a in TensorLayout.Legal)
        {
            foreach (TensorLayout b in TensorLayout.Legal)
            {
                Assert.That(OperatorRules.Add(a, b), Is.EqualTo(a == b ? a : (TensorLayout?)null), $"{a} + {b}");
            }
        }

        Assert.That(
            OperatorRules.Add(TensorLayout.Replicated, TensorLayout.PreReduce, onOneRank: true),
            Is.EqualTo(TensorLayout.PreReduce));
        Assert.That(OperatorRules.Add(TensorLayout.SplitRows, TensorLayout.PreReduce, onOneRank: true), Is.Null);
    }

    private static IEnumerable<TensorLayout> Inputs(IEnumerable<OperatorCase> cases)
    {
        Assert.That(cases.All(c => c.Input == c.Output && c.Weight is null));
        return cases.Select(c => c.Input);
    }
}
