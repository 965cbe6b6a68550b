using System.Diagnostics;
using System.Text;
using FlexLLM.Graph;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>Graphs of every PEFT method after every pass: verified for all, approved as text for the smallest of each kind.</summary>
[TestFixture]
internal sealed class PeftPassTests
{
    private static IEnumerable<TestCaseData> Approved()
    {
        yield return new TestCaseData("serial-adapter", new SerialAdapterConfig { Size = 5 });
        yield return new TestCaseData("ia3", new Ia3Config());
    }

    [Test]
    public void Passes_OfEveryMethod_LeaveASoundGraph(
        [ValueSource(typeof(PeftMethods), nameof(PeftMethods.All))] PeftConfig method, [Values] ModelArchitecture architecture,
        [Values(null, 0, 300)] long? budget, [Values] bool prunes, [Values] bool bf16)
    {
        ModelConfig config = TinyModel.ConfigOf(architecture, 3);
        var options = new CompilerOptions
        {
            Prunes = prunes,
            StoresSavedAsBF16 = bf16,
            Rematerialization = new RematerializationOptions { SavedColumnsMax = budget },
        };
        PassResult[] passes = [.. GraphCompiler.Passes(TrainingGraphs.Of(config, method), options)];
        string forward = GraphPrinter.Print(passes[0].Graph);
        foreach (PassResult pass in passes)
        {
            Assert.That(() => GraphVerifier.Verify(pass.Graph), Throws.Nothing, pass.Pass);
            string kept = Text(pass.Graph, n => !n.IsBackward && n.Op != OpKind.Pack);
            Assert.That(kept, Is.EqualTo(forward), $"{pass.Pass}: inference needs it");
            Assert.That(pass.Graph.Nodes.Select(n => n.Id), Is.EqualTo(Enumerable.Range(0, pass.Graph.Nodes.Count)), pass.Pass);
        }

        // Every trainable tensor has one gradient, from the first pass that makes any to the last.
        IEnumerable<string> trainable = passes[0].Graph.Values.Where(v => v.Kind == ValueKind.TrainableWeight).Select(v => $"d {v.Name}");
        Assert.That(trainable, Is.Not.Empty);
        foreach (PassResult pass in passes[1..])
        {
            string[] made = [.. pass.Graph.Nodes.SelectMany(n => n.Outputs).Select(o => pass.Graph.Values[o].Name)];
            Assert.That(trainable.Select(t => made.Count(m => m == t)), Is.All.EqualTo(1), pass.Pass);
        }
    }

    [Test]
    public void Passes_Control_NodeThatALaterOneNeedsIsGone_IsNoticed(
        [ValueSource(typeof(PeftMethods), nameof(PeftMethods.All))] PeftConfig method)
    {
        ParallelGraph graph = TrainingGraphs.After("fuse", TrainingGraphs.Of(TinyModel.ConfigOf(ModelArchitecture.Qwen3), method));
        HashSet<int> read = [.. graph.Nodes.SelectMany(n => n.Inputs)];
        int victim = graph.Nodes.Last(n => n.Recomputes && n.Outputs.Any(read.Contains)).Id;
        Assert.That(
            () => GraphVerifier.Verify(graph.WithNodes(graph.Nodes.Where(n => n.Id != victim))), Throws.TypeOf<UnreachableException>());
    }

    [TestCaseSource(nameof(Approved))]
    public void Passes_OneLayer_PrintAsReviewed(string name, PeftConfig method)
    {
        ParallelGraph job = TrainingGraphs.Of(TinyModel.ConfigOf(ModelArchitecture.Llama, 1), method);
        var text = new StringBuilder();
        foreach (PassResult pass in GraphCompiler.Passes(job, new CompilerOptions()))
        {
            Append(pass.Pass, pass.Graph, onlyBackward: pass.Pass != "build");
        }

        var none = new RematerializationOptions { SavedColumnsMax = 0 };
        Append(
            "rematerialize under a budget of nothing",
            TrainingGraphs.After("rematerialize", job, new CompilerOptions { Rematerialization = none }), onlyBackward: true);
        GoldenText.Check(text.ToString(), "Graph", "Approved", $"{name}.txt");

        void Append(string title, ParallelGraph graph, bool onlyBackward)
        {
            text.Append($"== {title}\n").Append(Text(graph, n => !onlyBackward || n.IsBackward));
            if (onlyBackward)
            {
                text.Append($"saved: {string.Join(", ", GraphPruner.SavedSet(graph).Select(v => v.Name))}\n");
            }

            text.Append('\n');
        }
    }

    private static string Text(ParallelGraph graph, Func<GraphNode, bool> which) =>
        GraphPrinter.Print(new ParallelGraph(graph.Values, [.. graph.Nodes.Where(which)]));
}
