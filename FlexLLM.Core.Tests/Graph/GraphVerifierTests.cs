using System.Diagnostics;
using FlexLLM.Graph;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>The verifier between passes sees every kind of broken graph.</summary>
[TestFixture]
internal sealed class GraphVerifierTests
{
    [Test]
    public void Verify_SoundGraph_Passes() => Assert.That(GraphVerifier.Verify(Sound().Build()).Nodes, Has.Count.EqualTo(3));

    [Test]
    public void Verify_UseBeforeDefinition_NamesTheValue()
    {
        ParallelGraph graph = Sound().Build();
        Assert.That(
            () => GraphVerifier.Verify(graph.WithNodes(graph.Nodes.Reverse())),
            Throws.TypeOf<UnreachableException>().With.Message.Contains("computed before"));
    }

    [Test]
    public void Verify_TwoProducers_NamesTheValue()
    {
        GraphBuilder graph = Sound();
        graph.Node(OpKind.Rope, [2], [3]);
        Assert.That(() => GraphVerifier.Verify(graph.Build()),
            Throws.TypeOf<UnreachableException>().With.Message.Contains("one producer"));
    }

    [Test]
    public void Verify_ProducedWeight_Fails()
    {
        GraphBuilder graph = Sound();
        graph.Node(OpKind.Rope, [2], [1]);
        Assert.That(() => GraphVerifier.Verify(graph.Build()), Throws.TypeOf<UnreachableException>());
    }

    [TestCase(OpKind.Linear, 1)]
    [TestCase(OpKind.Linear, 4)]
    [TestCase(OpKind.Rope, 2)]
    [TestCase(OpKind.Attention, 3)] // It has two results.
    public void Verify_WrongArity_Fails(OpKind op, int inputs)
    {
        GraphBuilder graph = Sound();
        graph.Activation(op, "bad", 8, [.. Enumerable.Repeat(2, inputs)]);
        Assert.That(() => GraphVerifier.Verify(graph.Build()), Throws.TypeOf<UnreachableException>());
    }

    [TestCase(OpKind.Add, 8, 6)]
    [TestCase(OpKind.Add, 6, 8)]
    [TestCase(OpKind.SiluGate, 8, 6)]
    public void Verify_WidthsThatDoNotMatch_Fails(OpKind op, int second, int result)
    {
        GraphBuilder graph = Sound();
        int other = graph.Activation(OpKind.Linear, "other", second, 2, 1);
        graph.Activation(op, "bad", result, 2, other);
        Assert.That(() => GraphVerifier.Verify(graph.Build()), Throws.TypeOf<UnreachableException>());
    }

    [Test]
    public void Differentiate_SharedInput_SumsItsGradients()
    {
        var graph = new GraphBuilder();
        int table = graph.Weight("table", 8);
        int x = graph.Activation(OpKind.Embed, "x", 8, table);
        int sum = graph.Activation(OpKind.Add, "sum", 8, x, x);
        int loss = graph.Value("loss", ValueKind.Activation, 1);
        int d = graph.Value("d sum", ValueKind.Gradient, 8);
        graph.Node(OpKind.CrossEntropy, [sum, table], [loss, d]);
        string text = GraphPrinter.Print(Differentiator.Differentiate(graph.Build()));
        Assert.That(text, Does.EndWith("d x = AddGradient(d sum, d sum)\nd table = EmbedBackward(d x)\n"));
    }

    // table, W | x = Embed(table), y = Linear(x, W), z = Rope(y): values 0..4.
    private static GraphBuilder Sound()
    {
        var graph = new GraphBuilder();
        int table = graph.Weight("table", 8);
        int weight = graph.Weight("W", 8);
        int x = graph.Activation(OpKind.Embed, "x", 8, table);
        int y = graph.Activation(OpKind.Linear, "y", 8, x, weight);
        graph.Activation(OpKind.Rope, "z", 8, y);
        return graph;
    }
}
