using System.Text.RegularExpressions;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>Pictures are DOT that a parser reads, and mark what is kept.</summary>
[TestFixture]
internal sealed partial class GraphPictureTests
{
    private static readonly PeftConfig[] Methods =
    [
        new LoraConfig { Rank = 2, TargetModules = ["down_proj"] },
        new LoraConfig { Rank = 2, TargetModules = AdapterSites.ModuleNames },
        new SerialAdapterConfig { Size = 4 },
        new Ia3Config(),
    ];

    [Test]
    public void Dot_EveryPassAndLayer_IsReadByAParser(
        [ValueSource(nameof(Methods))] PeftConfig method, [Values] ModelArchitecture architecture)
    {
        ModelConfig config = TinyModel.ConfigOf(architecture, 3);
        foreach (PassResult pass in GraphCompiler.Passes(TrainingGraphs.Of(config, method), new CompilerOptions()))
        {
            for (int layer = 0; layer < 3; layer++)
            {
                Picture picture = Picture.Parse(GraphPicture.Dot(pass.Graph, layer));
                Assert.That(
                    picture.Nodes.Keys.Where(n => n[0] == 'n'),
                    Is.EquivalentTo(pass.Graph.Nodes.Where(n => n.Layer == layer).Select(n => $"n{n.Id}")), pass.Pass);
                Assert.That(picture.Edges.SelectMany(e => new[] { e.From, e.To }).Distinct(), Is.SubsetOf(picture.Nodes.Keys), pass.Pass);
            }
        }
    }

    [Test]
    public void Dot_AfterAllPasses_MarksWhatTheLayerKeeps()
    {
        ModelConfig config = TinyModel.ConfigOf(ModelArchitecture.Llama, 3);
        ParallelGraph graph = TrainingGraphs.After("fuse", TrainingGraphs.Of(config, Methods[0]));
        Picture picture = Picture.Parse(GraphPicture.Dot(graph, 1));
        string[] kept = [.. picture.Nodes.Where(n => n.Key[0] == 'k').Select(n => $"{n.Value["label"]} {n.Value["fillcolor"]}")];
        Assert.That(kept, Is.EquivalentTo(new[]
        {
            @"input\n48 kept lightpink", @"q_rope\n48 kept lightpink", @"lse\n4 kept lightpink", @"middle\n48 kept lightpink",
            @"gate\n100 kept lightpink", @"up\n100 kept lightpink", @"k_rope\n24 kept lightblue", @"v\n24 kept lightblue",
        }));
        Assert.That(picture.Nodes.Values.Count(n => n.GetValueOrDefault("style") == "filled,dashed"), Is.EqualTo(1), "act again");
        Assert.That(picture.Nodes.Values.Select(n => n["label"]), Does.Contain("layers.2.input").And.Contain("d layers.2.input"));
    }

    [Test]
    public void Dot_NameWithQuotes_IsEscaped()
    {
        var graph = new GraphBuilder();
        int x = graph.Activation(OpKind.Embed, "a \"b\" \\ c", 8, graph.Weight("table", 8));
        graph.Layer = 0;
        graph.Activation(OpKind.Rope, "y", 8, x);
        Picture picture = Picture.Parse(GraphPicture.Dot(graph.Build(), 0));
        Assert.That(picture.Nodes.Values.Select(n => n["label"]), Does.Contain("a \\\"b\\\" \\\\ c"));
    }

    [TestCase("digraph g { a -> ; }")]
    [TestCase("digraph g { a [label=\"x]; }")]
    [TestCase("digraph g { subgraph s { a; }")]
    [TestCase("graph g { a; }")]
    public void Parse_BrokenText_IsSeen(string text) => Assert.That(() => Picture.Parse(text), Throws.TypeOf<FormatException>());

    /// <summary>As much of the DOT language as pictures use: statements of nodes, edges, defaults and subgraphs.</summary>
    private sealed partial class Picture
    {
        private readonly List<string> _tokens;
        private int _at;

        private Picture(string text)
        {
            _tokens = [.. Token().Matches(text).Select(m => m.Value)];
            if (string.Concat(_tokens).Length != Space().Replace(Quoted().Replace(text, m => new string('q', m.Length)), "").Length)
            {
                throw new FormatException("Some of the text is no token.");
            }
        }

        public Dictionary<string, Dictionary<string, string>> Nodes { get; } = [];

        public List<(string From, string To)> Edges { get; } = [];

        public static Picture Parse(string text)
        {
            var picture = new Picture(text);
            picture.Expect("digraph");
            picture.Name();
            picture.Block();
            return picture._at == picture._tokens.Count ? picture : throw new FormatException("Text after the graph.");
        }

        private void Block()
        {
            Expect("{");
            while (!Take("}"))
            {
                Statement();
            }
        }

        private void Statement()
        {
            string name = Name();
            if (name == "subgraph")
            {
                Name();
                Block();
                return;
            }

            if (Take("="))
            {
                Name();
            }
            else if (Take("->"))
            {
                Edges.Add((name, Name()));
                Attributes();
            }
            else
            {
                Dictionary<string, string> attributes = Attributes();
                if (name is not ("node" or "edge") && !Nodes.TryAdd(name, attributes))
                {
                    throw new FormatException($"{name} stands there twice.");
                }
            }

            Expect(";");
        }

        private Dictionary<string, string> Attributes()
        {
            Dictionary<string, string> attributes = [];
            if (Take("["))
            {
                do
                {
                    string key = Name();
                    Expect("=");
                    attributes.Add(key, Name().Trim('"'));
                }
                while (Take(","));
                Expect("]");
            }

            return attributes;
        }

        private string Name() => _at < _tokens.Count && (char.IsLetterOrDigit(_tokens[_at][0]) || _tokens[_at][0] == '"')
            ? _tokens[_at++]
            : throw new FormatException($"A name is missing at token {_at}.");

        private void Expect(string token)
        {
            if (!Take(token))
            {
                throw new FormatException($"'{token}' is missing at token {_at}.");
            }
        }

        private bool Take(string token)
        {
            bool found = _at < _tokens.Count && _tokens[_at] == token;
            _at += found ? 1 : 0;
            return found;
        }

        [GeneratedRegex(@"[A-Za-z0-9_]+|->|[{}\[\];=,]|""(?:[^""\\]|\\.)*""")]
        private static partial Regex Token();

        [GeneratedRegex(@"""(?:[^""\\]|\\.)*""")]
        private static partial Regex Quoted();

        [GeneratedRegex(@"\s")]
        private static partial Regex Space();
    }
}
