using System.Reflection;
using System.Text.RegularExpressions;
using NUnit.Framework;

namespace FlexLLM.Tests.Repository;

/// <summary>Habits that no analyzer of the build holds.</summary>
[TestFixture]
internal sealed partial class TidyTests
{
    private const int LineLengthMax = 140;
    private const int CoreLinesMax = 500;

    private static readonly string[] TextFiles = ["*.cs", "*.csproj", "*.props", "*.json", "*.md", "*.sln", "*.txt", "run"];

    [Test]
    public void Repository_Files_HaveNoFault()
    {
        List<string> faults = [.. TextFiles.SelectMany(pattern => SourceText.Files("", pattern)).SelectMany(Faults)];
        Assert.That(faults, Is.Empty, string.Join('\n', faults));
    }

    [Test]
    public void Repository_Files_AreSeen()
    {
        List<string> paths = [.. TextFiles.SelectMany(pattern => SourceText.Files("", pattern)).Select(file => file.Path)];
        Assert.That(paths, Is.SupersetOf(new[] { "FlexLLM.Core/Engine/CoServingEngine.cs", "README.md", ".ci/run" }));
    }

    [TestCase("A.cs", "int\ta;\n")]
    [TestCase("A.cs", "int a; \n")]
    [TestCase("A.cs", "int a;\r\n")]
    [TestCase("A.cs", "// TO" + "DO: more\n")]
    [TestCase("A.cs", "throw new NotImplemented" + "Exception();\n")]
    [TestCase("README.md", "See /ho" + "me/me/models.\n")]
    [TestCase("A.csproj", "<Path>/wo" + "rk/model</Path>\n")]
    [TestCase("run", "cd C:\\" + "Users\\me\n")]
    public void Faults_PlantedFault_IsFound(string path, string text) =>
        Assert.That(Faults(new SourceFile(path, text)), Has.Exactly(1).Items);

    [Test]
    public void Faults_LongLineOrFile_IsFound()
    {
        string longest = new('x', LineLengthMax);
        string file = string.Concat(Enumerable.Repeat("a\n", CoreLinesMax));
        Assert.Multiple(() =>
        {
            Assert.That(Faults(new SourceFile("A.cs", longest + "\n")), Is.Empty);
            Assert.That(Faults(new SourceFile("A.cs", longest + "x\n")), Has.Exactly(1).Items);
            Assert.That(Faults(new SourceFile("FlexLLM.Core/A.cs", file)), Is.Empty);
            Assert.That(Faults(new SourceFile("FlexLLM.Core/A.cs", file + "a\n")), Has.Exactly(1).Items);
            Assert.That(Faults(new SourceFile("FlexLLM.Core/A.Table.cs", file + "a\n")), Is.Empty);
        });
    }

    [Test]
    public void TestClasses_AreNamedTests()
    {
        Type[] types = typeof(TidyTests).Assembly.GetTypes();
        string[] names = [.. types.Where(type => !type.IsAbstract && HasTests(type)).Select(type => type.Name)];
        Assert.That(names, Does.Contain(nameof(TidyTests)));
        Assert.That(names, Is.All.EndsWith("Tests"));
    }

    [Test]
    public void Readme_NamesTheCommandsThatCiRuns()
    {
        string root = SharedData.RepositoryRoot;
        string[] lines = [.. File.ReadAllLines(Path.Combine(root, "README.md")).Select(line => line.Split('#')[0].Trim())];
        string ci = File.ReadAllText(Path.Combine(root, ".ci", "run"));
        string[] commands = [.. ReadmeCommand().Matches(ci).Select(match => match.Groups[1].Value)];
        Assert.That(commands, Has.Length.EqualTo(2));
        Assert.That(commands, Is.SubsetOf(lines));
    }

    private static IEnumerable<string> Faults(SourceFile file)
    {
        string[] lines = file.Text.Split('\n');
        for (int i = 0; i < lines.Length; i++)
        {
            foreach (string fault in Faults(file.Path, lines[i]))
            {
                yield return $"{file.Path}:{i + 1}: {fault}";
            }
        }

        // Tables made by a program are as long as they are.
        bool hand = file.Path.StartsWith("FlexLLM.Core/", StringComparison.Ordinal)
            && file.Path.EndsWith(".cs", StringComparison.Ordinal) && !file.Path.EndsWith(".Table.cs", StringComparison.Ordinal);
        if (hand && lines.Length - 1 > CoreLinesMax)
        {
            yield return $"{file.Path}: {lines.Length - 1} lines, {CoreLinesMax} at most";
        }
    }

    private static IEnumerable<string> Faults(string path, string line)
    {
        if (MachinePath().Match(line) is { Success: true } machine)
        {
            yield return $"a path of one machine, '{machine.Value}'";
        }

        if (Unfinished().Match(line) is { Success: true } unfinished)
        {
            yield return $"'{unfinished.Value}': finish it";
        }

        if (!path.EndsWith(".cs", StringComparison.Ordinal))
        {
            yield break;
        }

        if (line.Contains('\t', StringComparison.Ordinal))
        {
            yield return "a tab";
        }

        if (line.Length > 0 && char.IsWhiteSpace(line[^1]))
        {
            yield return "white space at the end";
        }

        if (line.Length > LineLengthMax)
        {
            yield return $"{line.Length} columns, {LineLengthMax} at most";
        }
    }

    private static bool HasTests(Type type) => type.GetMethods()
        .Any(method => method.GetCustomAttributes().Any(a => a is NUnit.Framework.Interfaces.ITestBuilder or TestAttribute));

    // Written so that they do not match themselves.
    [GeneratedRegex(@"(?<![\w.*)\]])(?:[/](?:home|root|work|Users)/|[A-Z]:\\Users\\)")]
    private static partial Regex MachinePath();

    [GeneratedRegex(@"\b(?:TO[D]O|FIX[M]E|NotImplemented[E]xception)\b")]
    private static partial Regex Unfinished();

    [GeneratedRegex(@"^readme_\w+=""(.+)""$", RegexOptions.Multiline)]
    private static partial Regex ReadmeCommand();
}
