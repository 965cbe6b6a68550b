using System.Reflection;
using NUnit.Framework;

namespace FlexLLM.Tests.Repository;

[TestFixture]
internal sealed class LayerTests
{
    private const string Sampler = "namespace FlexLLM.Execution;\n\ninternal static class Sampler\n{\n}\n";

    [Test]
    public void Core_Sources_UseFoldersAboveOnly()
    {
        List<SourceFile> files = SourceText.Files("FlexLLM.Core");
        List<string> folders = [.. files.Select(file => file.Path.Split('/')[1]).Distinct()];
        Assert.That(folders, Is.EquivalentTo(LayerRules.Order), "A folder that the table does not name, or that is gone.");
        List<string> found = LayerRules.Violations(files);
        Assert.That(found, Is.Empty, string.Join('\n', found));
        files.Add(new("FlexLLM.Core/Primitives/A.cs", "namespace FlexLLM;\n\npublic sealed record A(FinetuningJob Job);\n"));
        Assert.That(LayerRules.Violations(files), Has.Count.EqualTo(1), "Control: among the real files a planted one is seen.");
    }

    [TestCase("Scheduling", "internal sealed class A\n{\n    private Sampling? _s;\n}", 1, TestName = "Control: a later type")]
    [TestCase("Graph", "using FlexLLM.Formats;", 1, TestName = "Control: the namespace of a folder beside it")]
    [TestCase("Backends", "using S = FlexLLM.Execution.Sampler;", 1, TestName = "Control: an alias")]
    [TestCase("Models", "internal sealed class A : FlexLLM.Sampling\n{\n}", 1, TestName = "Control: a full name")]
    [TestCase("Models", "internal sealed class A\n{\n    string S => $\"{Sampling.X} x\";\n}", 1, TestName = "Control: a hole")]
    [TestCase("Engine", "using FlexLLM.Execution;\npublic sealed record A(Sampler S);", 0, TestName = "Control: a right use")]
    [TestCase("Graph", "// Sampling\n/* Sampling */ record A(string S = \"Sampling\");", 0, TestName = "Control: not code")]
    [TestCase("Graph", "internal sealed class A\n{\n    bool B => x.Sampling is null;\n}", 0, TestName = "Control: a member")]
    public void Violations_PlantedSource_AreFound(string folder, string code, int count)
    {
        SourceFile[] files =
        [
            new("FlexLLM.Core/Execution/Sampler.cs", Sampler),
            new("FlexLLM.Core/Execution/Sampling.cs", "namespace FlexLLM;\n\npublic enum Sampling\n{\n}\n"),
            new($"FlexLLM.Core/{folder}/A.cs", Planted(folder, code)),
        ];
        Assert.That(LayerRules.Violations(files), Has.Count.EqualTo(count));
    }

    [TestCase("FlexLLM.Execution", "using FlexLLM.Backends;", 0)]
    [TestCase("FlexLLM", "using FlexLLM.Backends;", 0)]
    [TestCase("FlexLLM", "using FlexLLM.Finetuning;", 2)]
    public void Violations_NameInTwoFolders_GoesByNamespaceThenUsings(string space, string use, int count)
    {
        SourceFile[] files =
        [
            Workspace("Backends"),
            Workspace("Execution"),
            Workspace("Finetuning"),
            new("FlexLLM.Core/Execution/A.cs", $"{use}\n\nnamespace {space};\n\npublic sealed record A(Workspace W);\n"),
        ];
        Assert.That(LayerRules.Violations(files), Has.Count.EqualTo(count));
    }

    [Test]
    public void Core_RuntimeInterfaces_AreTheBackendOnly()
    {
        Assert.That(RuntimeInterfaces(typeof(CoServingEngine).Assembly), Is.EqualTo(new[] { "IComputeBackend" }));
        Assert.That(RuntimeInterfaces(typeof(IPlanted).Assembly), Does.Contain(nameof(IPlanted)), "Control: the rig finds one.");
    }

    // An interface that structs alone implement is the parameter of a specialised loop: nothing is dispatched at run time.
    private static List<string> RuntimeInterfaces(Assembly assembly) =>
    [
        .. assembly.GetTypes()
            .Where(type => type.IsInterface)
            .Where(type => !assembly.GetTypes().Any(user => user.IsValueType && type.IsAssignableFrom(user))
                || assembly.GetTypes().Any(user => user.IsClass && type.IsAssignableFrom(user)))
            .Select(type => type.Name),
    ];

    private static SourceFile Workspace(string folder) =>
        new($"FlexLLM.Core/{folder}/Workspace.cs", $"namespace FlexLLM.{folder};\n\ninternal sealed class Workspace\n{{\n}}\n");

    // Usings stand before the namespace.
    private static string Planted(string folder, string code)
    {
        ILookup<bool, string> lines = code.Split('\n').ToLookup(line => line.StartsWith("using ", StringComparison.Ordinal));
        return string.Join('\n', [.. lines[true], $"namespace FlexLLM.{folder};", .. lines[false]]);
    }

    private interface IPlanted;

    private sealed class Planter : IPlanted;
}
