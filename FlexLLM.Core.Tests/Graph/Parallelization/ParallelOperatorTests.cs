using FlexLLM.Graph.Parallelization;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph.Parallelization;

[TestFixture]
internal sealed class ParallelOperatorTests
{
    // The columns "backward is" and "bytes sent" of paper.md b.2; the gradient of a gathered or replicated value is partial.
    [TestCase("partition(tokens)", "[-,|,-]", "combine(tokens)")]
    [TestCase("partition(hidden)", "[-,-,|]", "combine(hidden)")]
    [TestCase("combine(tokens)", "[-,-,-]", "partition(tokens)")]
    [TestCase("combine(hidden)", "[-,-,-]", "partition(hidden)")]
    [TestCase("replicate", "[+,-,-]", "reduce")]
    [TestCase("reduce", "[-,-,-]", "replicate")]
    [TestCase("all-gather(tokens)", "[+,-,-]", "reduce-scatter(tokens)")]
    [TestCase("all-gather(hidden)", "[+,-,-]", "reduce-scatter(hidden)")]
    [TestCase("reduce-scatter(tokens)", "[-,|,-]", "all-gather(tokens)")]
    [TestCase("reduce-scatter(hidden)", "[-,-,|]", "all-gather(hidden)")]
    [TestCase("all-to-all(tokens,hidden)", "[-,-,|]", "all-to-all(hidden,tokens)")]
    [TestCase("all-to-all(hidden,tokens)", "[-,|,-]", "all-to-all(tokens,hidden)")]
    [TestCase("all-reduce", "[=,-,-]", null)]
    [TestCase("all-reduce", "[+,-,-]", "all-reduce")]
    [TestCase("all-gather(hidden)", "[=,-,-]", null)]
    public void Backward_IsTheCounterpart(string forward, string gradient, string? backward)
    {
        ParallelOperator op = ParallelOperator.All.Single(o => o.Label == forward);

        (ParallelOperator? move, TensorLayout result) = op.Backward(TensorLayout.Parse(gradient));

        Assert.That(move?.Label, Is.EqualTo(backward));
        Assert.That(result, Is.EqualTo(op.From == TensorLayout.PreReduce ? TensorLayout.Replicated : op.From));
    }

    [TestCase("partition(hidden)", true, 0)]
    [TestCase("partition(hidden)", false, 300)]
    [TestCase("replicate", true, 0)]
    [TestCase("replicate", false, 300)]
    [TestCase("combine(tokens)", false, 300)]
    [TestCase("reduce", false, 300)]
    [TestCase("all-reduce", false, 600)]
    [TestCase("all-gather(tokens)", false, 300)]
    [TestCase("reduce-scatter(hidden)", false, 300)]
    [TestCase("all-to-all(tokens,hidden)", false, 75)]
    public void ElementsSent_FourRanks_FollowsTheRing(string label, bool everywhere, double expected)
    {
        ParallelOperator op = ParallelOperator.All.Single(o => o.Label == label);

        Assert.That(op.ElementsSent(width: 400, ranks: 4, everywhere), Is.EqualTo(expected));
    }

    [TestCase("[+,-,-]", "[=,-,-]", "reduce replicate")]
    [TestCase("[-,|,-]", "[-,-,|]", "combine(tokens) partition(hidden)")]
    [TestCase("[-,-,-]", "[-,-,-]", "")]
    [TestCase("[=,-,-]", "[-,-,|]", null)]
    [TestCase("[-,-,-]", "[+,-,-]", null)]
    public void ShortestChain_OfBasicOperators_ComposesThem(string from, string to, string? expected)
    {
        IReadOnlyList<ParallelOperator>? chain = PlanEnumerator.ShortestChain(
            TensorLayout.Parse(from), TensorLayout.Parse(to), ParallelOperator.Basic, _ => true);

        Assert.That(chain is null ? null : string.Join(' ', chain.Select(op => op.Label)), Is.EqualTo(expected));
    }

    [Test]
    public void ShortestChain_OfAllOperators_IsNeverLongerThanOne()
    {
        IEnumerable<IReadOnlyList<ParallelOperator>?> chains =
            from a in TensorLayout.Legal
            from b in TensorLayout.Legal
            select PlanEnumerator.ShortestChain(a, b, ParallelOperator.All, _ => true);

        Assert.That(chains.Where(chain => chain is not null).Max(chain => chain!.Count), Is.EqualTo(1));
    }
}
