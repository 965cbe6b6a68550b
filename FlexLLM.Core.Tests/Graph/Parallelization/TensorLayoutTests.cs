using FlexLLM.Graph.Parallelization;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph.Parallelization;

[TestFixture]
internal sealed class TensorLayoutTests
{
    [Test]
    public void Parse_EveryLegalLayout_ReadsWhatWasPrinted()
    {
        Assert.That(TensorLayout.Legal.Select(layout => layout.ToString()), Is.EqualTo(
            new[] { "[-,-,-]", "[=,-,-]", "[+,-,-]", "[-,|,-]", "[-,-,|]" }));
        Assert.That(TensorLayout.Legal.Select(layout => TensorLayout.Parse(layout.ToString())), Is.EqualTo(TensorLayout.Legal));
    }

    [TestCase("[|,-,-]", Description = "the replica dimension has no slices")]
    [TestCase("[-,=,-]", Description = "only the replica dimension has copies")]
    [TestCase("[-,-,+]", Description = "only the replica dimension has partials")]
    [TestCase("[-,|,|]", Description = "one group of ranks splits one dimension")]
    [TestCase("[=,-,|]", Description = "one group of ranks does not copy and split")]
    [TestCase("[-,-,x]")]
    [TestCase("[-,-]")]
    [TestCase("")]
    public void Parse_Other_IsRejected(string text)
    {
        Assert.That(() => TensorLayout.Parse(text), Throws.TypeOf<FormatException>());
    }

    [Test]
    public void IsLegal_AllCombinations_HoldsForTheListedFiveOnly()
    {
        ShardState[] states = Enum.GetValues<ShardState>();
        IEnumerable<TensorLayout> all =
            from replica in states
            from rows in states
            from columns in states
            select new TensorLayout(replica, rows, columns);

        Assert.That(all.Where(layout => layout.IsLegal), Is.EquivalentTo(TensorLayout.Legal));
    }
}
